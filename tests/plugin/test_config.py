# SPDX-License-Identifier: Apache-2.0
"""The options: defaults, what is refused, and how."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_attn_offload import AttentionOffloadConfig
from vllm_attn_offload.config import CONFIG_KEY
from vllm_attn_offload.memory_node.args import parse_options

OPTIONS = [field.name for field in dataclasses.fields(AttentionOffloadConfig)]


def test_defaults() -> None:
    config = AttentionOffloadConfig.from_dict({})
    assert config == AttentionOffloadConfig()
    assert (config.memory_nodes, config.num_local_nodes) == ((), 1)
    assert config.kv_cache_gib is None


@pytest.mark.parametrize(
    "address", ["10.0.0.7:7600", "node-3:7600", "[fd00::7]:7600", "unix:/run/node.sock"]
)
def test_memory_nodes(address: str) -> None:
    config = AttentionOffloadConfig.from_dict({"memory_nodes": [address]})
    assert config.memory_nodes == (address,)


def test_is_frozen() -> None:
    config = AttentionOffloadConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kv_cache_gib = 1.0  # type: ignore[misc]


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="no option kv_cache_gb, nodes") as error:
        AttentionOffloadConfig.from_dict({"nodes": 1, "kv_cache_gb": 4})
    assert str(error.value).endswith(f"Valid options: {', '.join(OPTIONS)}.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_gib": 0}, r"kv_cache_gib: .*greater than 0 \(given: 0\)"),
        ({"kv_cache_gib": "much"}, r"kv_cache_gib: .*valid number.*\(given: 'much'\)"),
        ({"num_local_nodes": 0}, r"num_local_nodes: .*greater than or equal to 1"),
        ({"num_local_nodes": 1.5}, r"num_local_nodes: .*\(given: 1\.5\)"),
        ({"memory_nodes": "host:1"}, r"memory_nodes: .*valid tuple"),
        ({"memory_nodes": ["host"]}, r"'host' is not an address\. Allowed: HOST:PORT"),
        ({"memory_nodes": [7600]}, r"memory_nodes\.0: .*valid string"),
        ({"standby_nodes": ["host"]}, r"'host' is not an address"),
        ({"partition": "layers"}, r"partition: .*'heads', 'blocks' or 'auto'"),
        ({"on_node_loss": "ignore"}, r"on_node_loss: .*'recover' or 'fail'"),
        ({"request_timeout_s": -1}, r"request_timeout_s: .*greater than 0"),
        ({"startup_timeout_s": None}, r"startup_timeout_s: .*\(given: None\)"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AttentionOffloadConfig.from_dict(options)
    assert "Valid options: memory_nodes, " in str(error.value)


def test_several_nodes() -> None:
    assert AttentionOffloadConfig(num_local_nodes=3).num_nodes == 3
    assert AttentionOffloadConfig(memory_nodes=("a:1", "b:2")).num_nodes == 2


@pytest.mark.parametrize(
    "options",
    [
        {"memory_nodes": ["a:1", "b:2", "a:1"]},
        {"memory_nodes": ["a:1"], "standby_nodes": ["a:1"]},
    ],
)
def test_repeated_nodes(options: dict[str, Any]) -> None:
    message = r"name a:1 more than once\. Allowed: every node once\. Remove the"
    with pytest.raises(ValueError, match=message):
        AttentionOffloadConfig.from_dict(options)


@pytest.mark.parametrize("options", [True, "memory_nodes", 4, ["memory_nodes"]])
def test_options_that_are_no_object(options: object) -> None:
    with pytest.raises(ValueError, match=r"Allowed: an object; write \{\} for"):
        AttentionOffloadConfig.from_additional_config({CONFIG_KEY: options})


@pytest.mark.parametrize("additional_config", [{}, {"other": 1}, {CONFIG_KEY: None}])
def test_additional_config_without_options(additional_config: dict[str, Any]) -> None:
    assert AttentionOffloadConfig.from_additional_config(additional_config) is None


def test_additional_config_with_options() -> None:
    found = AttentionOffloadConfig.from_additional_config(
        {CONFIG_KEY: {"kv_cache_gib": 4}, "other": 1}
    )
    assert found == AttentionOffloadConfig(kv_cache_gib=4)


def engine_options() -> str:
    """The table of the engine's options, from the fields and their docstrings."""
    rows = ["| Option | Default | Meaning |", "|---|---|---|"]
    for name, field in vars(AttentionOffloadConfig)["__pydantic_fields__"].items():
        default = f"`{field.default}`".replace("()", "[]")
        default = "unset" if field.default in ("", None) else default
        rows.append(f"| `{name}` | {default} | {' '.join(field.description.split())} |")
    return "\n".join(rows)


def node_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The table of a memory node's options, from ``vllm-memory-node --help``."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    found = re.findall(
        r"^  (--\S+(?: \S+)?)\s+(.+)$", capsys.readouterr().out, re.MULTILINE
    )
    rows = ["| Option of `vllm-memory-node` | Meaning |", "|---|---|"]
    rows += [
        f"| `{name.replace('|', chr(92) + '|')}` | {text} |" for name, text in found
    ]
    return "\n".join(rows)


def test_readme_lists_every_option(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options stand in one place, in the words of the code."""
    text = (root / "vllm_attn_offload" / "README.md").read_text()
    section = text.partition("## Options\n")[2].partition("\n## ")[0]
    for table in (engine_options(), node_options(monkeypatch, capsys)):
        assert f"\n{table}\n" in section, f"paste below '## Options':\n{table}"


def test_front_page_repeats_options_correctly(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options in a table of README.md exist and have the default that is shown."""
    tables = f"{engine_options()}\n{node_options(monkeypatch, capsys)}"
    text = (root / "README.md").read_text()
    shown = re.findall(r"^\| (`-*[a-z_-]+`(?:, `.+`)?) \| (.+?) \|", text, re.MULTILINE)
    assert shown
    for names, cell in shown:
        for name in re.findall(r"[\w-]+", names):
            (row,) = re.findall(rf"^\| `{name}\b.*$", tables, re.MULTILINE)
            default = re.fullmatch(r"`?([\w\[\].:]+)`?", cell)
            if default is not None and default[1] not in ("none", "off", "unset"):
                assert re.search(rf"(`|default: ){re.escape(default[1])}(?!\w)", row)
