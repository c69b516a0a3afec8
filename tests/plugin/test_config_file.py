# SPDX-License-Identifier: Apache-2.0
"""``--config FILE``, through the parser of ``vllm serve``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import serve
from vllm.logger import _print_info_once
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_attn_offload.config import CONFIG_KEY, AttentionOffloadConfig

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


@pytest.mark.parametrize("quoted", ['"false"', "'False'", '" false "'])
@pytest.mark.parametrize("key", ["attention-offload", "attention_offload"])
def test_quoted_off(
    additional_config: Callable[..., Any], key: str, quoted: str
) -> None:
    assert additional_config(f"{key}: {quoted}\n{OPTIONS}") == {}
    assert additional_config(f"{OPTIONS}{key}: {quoted}\nseed: 1\n") == {}


@pytest.mark.parametrize(
    "switch",
    [
        "",
        "attention-offload: true\n",
        'attention-offload: "true"\n',
        "attention_offload: 'True'\n",
    ],
)
def test_options(additional_config: Callable[..., Any], switch: str) -> None:
    expected = {CONFIG_KEY: {"kv_cache_gib": 4}}
    assert additional_config(switch + OPTIONS) == expected
    assert additional_config(switch + OPTIONS, "--no-attention-offload") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention-offload: maybe", 'given "maybe" in the --config file. Allowed: tr'),
        ("attention-offload: 1", "given 1 in the --config file. Allowed: true or fal"),
        ("attention-offload:", "given null in the --config file. Allowed: true or f"),
        ("attention-offload: [true]", "given [true] in the --config file. Allowed: "),
        (
            "attention-offload: true\nattention_offload: false",
            "attention_offload was given twice, with - and with _. Allowed: one of",
        ),
        (
            f"{OPTIONS}attention_offload_config: {{}}",
            "attention_offload_config was given twice, with - and with _. Allowed: ",
        ),
        (
            f"{OPTIONS}  kv-cache-gib: 5",
            "kv_cache_gib was given twice, with - and with _. Allowed: one of the",
        ),
        (
            f"{OPTIONS}  local_node_cpus: 2026-01-02",
            'local_node_cpus was given "2026-01-02". Allowed: CPU numbers and ranges',
        ),
    ],
    ids=str,
)
def test_refused(
    additional_config: Callable[..., Any], text: str, message: str
) -> None:
    """In three parts, whatever YAML makes of it."""
    with pytest.raises(ValueError, match=re.escape(message)):
        additional_config(f"{text}\n")


def test_nothing_behind_a_name(additional_config: Callable[..., Any]) -> None:
    """As where the name is left out."""
    assert additional_config("attention-offload-config:\n") == {}
    assert additional_config("attention_offload_config:\nseed: 1\n") == {}
    options = additional_config(f"{OPTIONS}  memory_nodes:\n")[CONFIG_KEY]
    expected = AttentionOffloadConfig(kv_cache_gib=4)
    assert AttentionOffloadConfig.from_dict(options) == expected


def test_dates_of_other_options_are_for_others(
    additional_config: Callable[..., Any],
) -> None:
    with pytest.raises(TypeError):
        additional_config(f"{OPTIONS}speculative-config:\n  model: 2026-01-02\n")


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
