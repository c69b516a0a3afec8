# SPDX-License-Identifier: Apache-2.0
"""The flags, through vLLM's own parser and into ``EngineArgs``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_attn_offload.config import CONFIG_KEY, AttentionOffloadConfig

pytestmark = pytest.mark.usefixtures("patched")

Parse = Callable[..., Any]
FLAG = "--attention-offload"
CONFIG = "--attention-offload-config"
ADDITIONAL = "--additional-config"


@pytest.fixture
def additional_config(smollm2: str) -> Parse:
    """What the engine gets for a command line."""

    def parse(*arguments: str, cls: type[EngineArgs] = EngineArgs) -> Any:
        parser = cls.add_cli_args(FlexibleArgumentParser())
        namespace = parser.parse_args(["--model", smollm2, *arguments])
        return cls.from_cli_args(namespace).additional_config

    return parse


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((FLAG,), {}),
        ((CONFIG, "{}"), {}),
        ((FLAG, CONFIG, '{"kv_cache_gib": 4}'), {"kv_cache_gib": 4}),
        ((f"{CONFIG}.kv_cache_gib", "4"), {"kv_cache_gib": 4}),
        ((f"{CONFIG}.kv_cache_gib=0.5",), {"kv_cache_gib": 0.5}),
        (
            (f"{CONFIG}.kv_cache_gib", "4", f"{CONFIG}.num_local_nodes", "1"),
            {"kv_cache_gib": 4, "num_local_nodes": 1},
        ),
        (
            (f"{CONFIG}.memory_nodes+", "unix:/n.sock"),
            {"memory_nodes": ["unix:/n.sock"]},
        ),
        (
            (CONFIG, '{"memory_nodes": ["[::1]:7600"]}'),
            {"memory_nodes": ["[::1]:7600"]},
        ),
    ],
)
def test_options(
    additional_config: Parse, arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    assert additional_config(*arguments) == {CONFIG_KEY: options}
    assert additional_config(*arguments, cls=AsyncEngineArgs) == {CONFIG_KEY: options}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--no-attention-offload",),
        # An explicit no wins over options, as from a shared configuration file.
        ("--no-attention-offload", f"{CONFIG}.kv_cache_gib", "4"),
    ],
)
def test_without_the_flag(additional_config: Parse, arguments: tuple[str, ...]) -> None:
    assert additional_config(*arguments) == {}


@pytest.mark.parametrize(
    "other",
    [
        (ADDITIONAL, '{"other": 2, "attention_offload": {"request_timeout_s": 9}}'),
        (
            *(f"{ADDITIONAL}.other", "2"),
            *(f"{ADDITIONAL}.attention_offload.request_timeout_s", "9"),
        ),
    ],
    ids=["json", "dotted"],
)
def test_additional_config_is_kept_in_both_orders(
    additional_config: Parse, other: tuple[str, ...]
) -> None:
    ours = (FLAG, f"{CONFIG}.kv_cache_gib", "4")
    both = {
        "other": 2,
        CONFIG_KEY: {"request_timeout_s": 9, "kv_cache_gib": 4},
    }
    assert additional_config(*ours, *other) == both
    assert additional_config(*other, *ours) == both
    assert additional_config(*other, FLAG)["other"] == 2


def test_flag_wins_over_additional_config(additional_config: Parse) -> None:
    given = f"{ADDITIONAL}.attention_offload.kv_cache_gib"
    found = additional_config(given, "1", f"{CONFIG}.kv_cache_gib", "4")
    assert found == {CONFIG_KEY: {"kv_cache_gib": 4}}


def test_flag_wins_over_another_spelling(additional_config: Parse) -> None:
    given = f"{ADDITIONAL}.attention_offload.kv-cache-gib"
    found = additional_config(given, "1", f"{CONFIG}.kv_cache_gib", "4")
    assert found == {CONFIG_KEY: {"kv_cache_gib": 4}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (f"{CONFIG}.kv_cache_gb", "4"),
            "no option kv_cache_gb. Did you mean kv_cache_gib",
        ),
        (
            (f"{CONFIG}.kv_cache_gib", "-4"),
            "kv_cache_gib was given -4. Allowed: a number of GiB above 0",
        ),
        ((f"{CONFIG}.memory_nodes", '["a:1", "a:1"]'), "name a:1 more than once"),
        (
            (FLAG, ADDITIONAL, '{"attention_offload": true}'),
            "given True as its options. Allowed: an object",
        ),
        (
            (FLAG, f"{ADDITIONAL}.attention_offload.budget", "2"),
            "no option budget. Valid options: mem",
        ),
    ],
)
def test_refused_options(
    additional_config: Parse, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        additional_config(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_cache_gib=4", "'kv_cache_gib=4' is not JSON"),
        ("[1]", "'[1]' is not a JSON object. Write for example"),
    ],
)
def test_refused_json(
    additional_config: Parse,
    text: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        additional_config(CONFIG, text)
    assert message in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--help=AttentionOffloadConfig"])
    text = capsys.readouterr().out
    assert "--attention-offload, --no-attention-offload" in text
    for field in dataclasses.fields(AttentionOffloadConfig):
        assert f"- {field.name}: " in text
