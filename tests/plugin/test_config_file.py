# SPDX-License-Identifier: Apache-2.0
"""``--config FILE``, through the parser of ``vllm serve``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import serve
from vllm.logger import _print_info_once
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_attn_offload.config import CONFIG_KEY

pytestmark = pytest.mark.usefixtures("patched")

OPTIONS = "attention-offload-config:\n  kv_cache_gib: 4\n"


@pytest.fixture
def additional_config(smollm2: str, tmp_path: Path) -> Callable[..., Any]:
    """What the engine of ``vllm serve`` gets for a file and arguments."""
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(required=False, dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(subparsers)

    def parse(text: str, *arguments: str) -> Any:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        namespace = parser.parse_args(
            ["serve", smollm2, "--config", str(file), *arguments]
        )
        namespace.model = namespace.model_tag  # as the command does
        return AsyncEngineArgs.from_cli_args(namespace).additional_config

    return parse


@pytest.mark.parametrize("key", ["attention-offload", "attention_offload"])
def test_off_wins_over_options(additional_config: Callable[..., Any], key: str) -> None:
    assert additional_config(f"{key}: false\n{OPTIONS}") == {}
    assert additional_config(f"{OPTIONS}{key}: false\n") == {}
    assert additional_config(f"{key}: false\n") == {}


@pytest.mark.parametrize("switch", ["", "attention-offload: true\n"])
def test_options(additional_config: Callable[..., Any], switch: str) -> None:
    expected = {CONFIG_KEY: {"kv_cache_gib": 4}}
    assert additional_config(switch + OPTIONS) == expected
    assert additional_config(switch + OPTIONS, "--no-attention-offload") == {}


def test_command_line_wins_over_the_file(additional_config: Callable[..., Any]) -> None:
    found = additional_config(
        f"attention-offload: false\n{OPTIONS}", "--attention-offload"
    )
    assert found == {CONFIG_KEY: {"kv_cache_gib": 4}}


def test_unused_options_are_told_once(additional_config: Callable[..., Any]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_attn_offload.patches.engine_args")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # as the command does after parsing
    _print_info_once.cache_clear()
    try:
        additional_config("attention-offload: false\n")
        assert not records
        for _ in range(2):
            additional_config(f"attention-offload: false\n{OPTIONS}")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.setLevel(logging.NOTSET)
    (record,) = records
    assert record.levelname == "INFO"
    assert "attention-offload-config is not used" in record.getMessage()
