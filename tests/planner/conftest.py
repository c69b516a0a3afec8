# SPDX-License-Identifier: Apache-2.0
"""Shapes read once per session, the paper's hardware, and the catalogue."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_attn_offload.planner.hardware.catalogue import Catalogue, load_catalogue
from vllm_attn_offload.planner.model.config import read_configs, shape_from_config
from vllm_attn_offload.planner.model.shape import ModelShape

CONFIGS = Path(__file__).with_name("configs")


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return load_catalogue()


@pytest.fixture(scope="session")
def shapes() -> dict[str, ModelShape]:
    """Every fixture model, through the real transformers config classes."""
    paths = sorted(CONFIGS.glob("*/config.json"))
    return {
        path.parent.name: shape_from_config(config, path.parent.name)
        for path, config in zip(paths, read_configs(paths), strict=True)
    }
