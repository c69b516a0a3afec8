# SPDX-License-Identifier: Apache-2.0
"""Kernels run in the interpreter, unless this host has a GPU: tests/conftest.py."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this session run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
