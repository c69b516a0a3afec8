# SPDX-License-Identifier: Apache-2.0
"""Options of `doctor`, named as those of the engine that is to be."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from vllm_attn_offload.config import AttentionOffloadConfig, spelled_alike
from vllm_attn_offload.trust_options import add_trust_options, given_files

_OPTION = "--attention-offload-config"
_FILE_KEY = "attention_offload_config"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the engine's options of attention offloading."""
    add = parser.add_argument_group("attention offloading").add_argument
    add(
        "--memory-nodes",
        metavar="A,B",
        help="addresses of running memory nodes; none: the engine starts its own here",
    )
    add(
        _OPTION,
        type=_json_object,
        default={},
        metavar="JSON",
        help=f"as of vllm serve; single options as well: {_OPTION}.kv_cache_gib 4",
    )
    add("--config", type=Path, metavar="FILE", help="as of vllm serve (YAML)")
    for field in dataclasses.fields(AttentionOffloadConfig):
        option = f"{_OPTION}.{field.name}"
        add(option, dest=option, metavar="VALUE", help=argparse.SUPPRESS)
    add_trust_options(parser)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Merge what was given, the file first and the shortest spelling last.

    Raises:
        ValueError: An unknown option, a bad value or a file that cannot be read.
    """
    options = spelled_alike(args.attention_offload_config)
    if args.config is not None:
        of_file = _of_file(args.config).get(_FILE_KEY)
        options = spelled_alike(of_file or {}) | options
    values = vars(args)
    for field in dataclasses.fields(AttentionOffloadConfig):
        dotted = values[f"{_OPTION}.{field.name}"]
        if dotted is not None:
            options[field.name] = dotted
    if args.memory_nodes is not None:
        options["memory_nodes"] = args.memory_nodes
    options |= {name: path for name, path in given_files(args).items() if path}
    AttentionOffloadConfig.from_dict(options)
    return options


def given_model(args: argparse.Namespace) -> str:
    """Return MODEL, or the model of the file; empty where neither names one.

    Raises:
        ValueError: The file cannot be read.
    """
    if args.model or args.config is None:
        return str(args.model)
    return str(_of_file(args.config).get("model") or "")


def _of_file(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(
            f"--config {path} was given, and PyYAML, which reads it, is not installed "
            f"here. Allowed without: {_OPTION} JSON. Run: pip install pyyaml"
        ) from error
    try:
        content = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"--config {path} cannot be read ({' '.join(str(error).split())}). "
            "Allowed: a YAML file such as vllm serve --config takes. Correct it."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path} holds no options. Allowed: a YAML file of names and "
            "values. Write for example attention-offload-config: {kv_cache_gib: 4}."
        )
    return spelled_alike(content)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object. Allowed: an object of options. Write for "
            """example '{"kv_cache_gib": 4}'."""
        )
    return value
