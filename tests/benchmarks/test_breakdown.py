# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer's time, from counters of both sides."""

from __future__ import annotations

import pytest
from engines.breakdown import per_layer_us

#: Seconds of 10 steps with 30 layers, of which 2 were cut and so sent twice.
CALLS = 10 * 30
SPENT = {
    "steps": 12,
    "layer calls": 12 * 30,
    "cut steps": 2,
    "pack": 3e-6 * CALLS,
    "send": 5e-6 * CALLS,
    "wait": 80e-6 * CALLS,
    "attention": 95e-6 * CALLS,
    "attention cpu": 18e-6 * CALLS,
    "node plan": 2e-6 * CALLS,
    "node receive": 1e-6 * CALLS,
    "node queue": 1e-6 * CALLS,
    "node store": 10e-6 * CALLS,
    "node attend": 40e-6 * CALLS,
    "node send": 4e-6 * CALLS,
    "node layer": 59e-6 * CALLS,
    "node cpu": 65e-6 * CALLS,
}


def test_parts_of_a_layer() -> None:
    us = per_layer_us(SPENT)
    assert us["python"] == pytest.approx(95 - 3 - 5 - 80)
    assert us["node python"] == pytest.approx(59 - 1 - 1 - 10 - 40 - 4)
    assert us["node plan"] == pytest.approx(2)
    assert us["overhead"] == pytest.approx(18 + 65 - 10 - 40)
    assert (us["cpu"], us["node cpu"]) == pytest.approx((18, 65))


def test_stock_has_none() -> None:
    assert per_layer_us({}) == {}
