# SPDX-License-Identifier: Apache-2.0
"""The model's own configuration: whether it can be read, and what it asks of nodes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.planner.model.config import (
    ENGINE_DTYPES,
    KV_DTYPE_BYTES,
    find_config,
    read_model_shape,
)
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.protocol.byte_size import byte_size


def read_shape(model: str, engine_options: Sequence[str]) -> ModelShape:
    """Read the model as the engine's own options would have it.

    Raises:
        ValueError: There is no such model, or the planner cannot describe it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    given, _ = parser.parse_known_args(engine_options)
    dtype = given.dtype if given.dtype in ENGINE_DTYPES else "auto"
    kv = given.kv_cache_dtype if given.kv_cache_dtype in KV_DTYPE_BYTES else "auto"
    return read_model_shape(model, kv, dtype=dtype)


def config_directory(model: str) -> str:
    """Where an engine finds the model; empty where it has no directory of its own."""
    found = _find(model)
    return str(found.parent) if found and found.name == "config.json" else ""


def _find(model: str) -> Path | None:
    if not model:
        return None
    try:
        return find_config(model)
    except ValueError:
        return None  # said by the look at the model


def check_model(case: Case) -> Iterator[Finding]:
    """Say what a token and the weights take."""
    assert case.shape is not None
    try:
        shape = case.shape.result()
    except ValueError as error:
        yield _unknown(case, error)
        return
    yield Finding.ok(
        "configuration",
        f"{shape.name}: {byte_size(int(shape.weight_bytes))} of weights, "
        f"{shape.num_layers} layers with attention, "
        f"{byte_size(int(shape.kv_bytes_per_token))} of KV cache a token",
    )
    if not case.is_engine_host:
        yield Finding.ok("engine", "not checked: vLLM is not installed")


def _unknown(case: Case, error: ValueError) -> Finding:
    """What the planner cannot describe may still serve: the engine's check says it."""
    allowed = "a config.json of a model that the planner knows"
    finding = Finding.of_error("configuration", error, allowed)
    if _find(case.model) is None:
        return finding
    if not case.is_engine_host or not config_directory(case.model):
        # What to do is said for the planner's own options.
        return Finding.fail(
            finding.check,
            finding.found,
            finding.allowed,
            "Run doctor where vLLM is, with the model's directory: vLLM judges it.",
        )
    return Finding.warn(
        finding.check,
        f"room in tokens not checked: {finding.found}",
        finding.allowed,
        "See below whether vLLM takes the model; its log says how many tokens fit.",
    )
