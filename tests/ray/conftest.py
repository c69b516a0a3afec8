# SPDX-License-Identifier: Apache-2.0
"""A real Ray cluster of three raylets on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_cluster import RayCluster


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    """A head without memory nodes and two hosts for one each; RAY_ADDRESS names it."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with RayCluster() as cluster:
        yield cluster
