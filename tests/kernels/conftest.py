# SPDX-License-Identifier: Apache-2.0
"""Kernels are defined for the interpreter, unless this host has a GPU."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before any kernel is imported: the decorator reads it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this session run."""
    return torch.device("cuda" if HAS_GPU else "cpu")
