# SPDX-License-Identifier: Apache-2.0
"""The options: defaults, what is refused, and how."""

from __future__ import annotations

import dataclasses
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from error_texts import PYTHON

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


@pytest.mark.parametrize(
    ("options", "pool", "addresses"),
    [
        ({"memory_nodes": "ray", "kv_cache_gib": 1}, "", ()),
        ({"memory_nodes": ["ray:pool-1"]}, "pool-1", ()),
        ({"memory_nodes": "ray:7600"}, None, ("ray:7600",)),
        ({}, None, ()),
    ],
    ids=str,
)
def test_pools_of_ray(
    options: dict[str, Any], pool: str | None, addresses: tuple[str, ...]
) -> None:
    """A number behind ``ray:`` is the port of a host of that name."""
    config = AttentionOffloadConfig.from_dict(options)
    assert (config.ray_pool, config.addresses) == (pool, addresses)
    assert config.open_nodes == list(addresses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "kv_cache_gib was not given together with memory_nodes ray. Allowed:"),
        ({"memory_nodes": ["ray", "a:1"]}, "given ray, a:1. Allowed: ray or ray:NAME"),
        ({"memory_nodes": ["ray:a", "ray:b"]}, "given ray:a, ray:b. Allowed: ray or"),
        ({"memory_nodes": "ray:a b"}, "'ray:a b' is not an address"),
        ({"num_local_nodes": 2}, "num_local_nodes was given together with memory_nod"),
        ({"local_node_cpus": "0"}, "local_node_cpus was given together with memory_n"),
        (dict.fromkeys(("tls_cert", "tls_key", "tls_ca"), "a"), "tls_cert, tls_key, t"),
        ({"memory_nodes": "ray:a", "ray_nodes": 2}, "ray_nodes was given together wi"),
        ({"memory_nodes": "a:1", "ray_device": "cuda"}, "ray_device was given togeth"),
        ({"memory_nodes": (), "ray_resources": {"a": 1}}, "ray_resources was given t"),
        ({"standby_nodes": "ray"}, "'ray' is not an address"),
    ],
    ids=str,
)
def test_bad_options_of_ray(options: dict[str, Any], message: str) -> None:
    given = {"memory_nodes": "ray", "kv_cache_gib": 1} if options else {}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        AttentionOffloadConfig.from_dict(
            given | options if options else {"memory_nodes": "ray"}
        )
    assert "Allowed: " in str(error.value)


def test_is_frozen() -> None:
    config = AttentionOffloadConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kv_cache_gib = 1.0  # type: ignore[misc]


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="no option kv_cache_gb, xyz") as error:
        AttentionOffloadConfig.from_dict({"xyz": 1, "kv_cache_gb": 4})
    expected = f"Did you mean kv_cache_gib? Valid options: {', '.join(OPTIONS)}."
    assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"local_node_cpus": 1}, {"local_node_cpus": "1"}),
        ({"local_node_cpus": [0, 1]}, {"local_node_cpus": "0,1"}),
        ({"local_node_cpus": ["0-1", 4]}, {"local_node_cpus": "0-1,4"}),
        ({"local_node_cpus": "0-1, 4"}, {"local_node_cpus": "0-1,4"}),
        ({"memory_nodes": "10.0.0.7:7600"}, {"memory_nodes": ("10.0.0.7:7600",)}),
        ({"memory_nodes": "a:1, b:2"}, {"memory_nodes": ("a:1", "b:2")}),
        ({"memory_nodes": ["unix:/a,b"]}, {"memory_nodes": ("unix:/a,b",)}),
        ({"memory_nodes": ["a:1,b:2"]}, {"memory_nodes": ("a:1", "b:2")}),
        ({"memory_nodes": '["a:1", "b:2"]'}, {"memory_nodes": ("a:1", "b:2")}),
        ({"memory_nodes": "[::1]:1,[::2]:2"}, {"memory_nodes": ("[::1]:1", "[::2]:2")}),
        ({"standby_nodes": "a:1"}, {"standby_nodes": ("a:1",)}),
        ({"num_microbatches": "2"}, {"num_microbatches": 2}),
        ({"num_microbatches": " AUTO"}, {"num_microbatches": "auto"}),
        ({"num_local_nodes": "3"}, {"num_local_nodes": 3}),
        ({"kv_cache_gib": "0.5"}, {"kv_cache_gib": 0.5}),
        ({"kv_cache_gib": None}, {}),
        ({"memory_nodes": None, "standby_nodes": None}, {}),
        ({"local_node_cpus": None, "auth_token_file": None}, {}),
        ({"kv-cache-gib": 4}, {"kv_cache_gib": 4.0}),
        ({"partition": "Heads"}, {"partition": "heads"}),
        ({"request_timeout_s": "5"}, {"request_timeout_s": 5.0}),
        ({"unavailable_grace_s": 0}, {"unavailable_grace_s": 0.0}),
        ({"auth_token_file": "~/t"}, {"auth_token_file": str(Path.home() / "t")}),
    ],
    ids=str,
)
def test_values_as_people_write_them(
    written: dict[str, Any], meant: dict[str, Any]
) -> None:
    config = AttentionOffloadConfig.from_dict(written)
    assert config == AttentionOffloadConfig(**meant)


def test_home_in_tls_files() -> None:
    """All three are given, or none."""
    names = ("tls_cert", "tls_key", "tls_ca")
    config = AttentionOffloadConfig.from_dict({name: f"~/{name}" for name in names})
    home = Path.home()
    assert [getattr(config, name) for name in names] == [str(home / n) for n in names]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_gib": 0}, "given 0. Allowed: a number of GiB above 0. Write for"),
        ({"kv_cache_gib": "much"}, 'given "much". Allowed: a number of GiB above 0.'),
        ({"kv_cache_gib": float("inf")}, "given Infinity. Allowed: a number of GiB"),
        ({"kv_cache_gib": "nan"}, 'given "nan". Allowed: a number of GiB above 0.'),
        ({"kv_cache_gib": True}, "given true. Allowed: a number of GiB above 0."),
        ({"num_local_nodes": 0}, "given 0. Allowed: a whole number from 1 to 64."),
        ({"num_local_nodes": 1.5}, "given 1.5. Allowed: a whole number from 1 to"),
        ({"num_local_nodes": True}, "given true. Allowed: a whole number from 1"),
        ({"num_microbatches": 3}, "given 3. Allowed: 1, 2 or auto."),
        ({"num_microbatches": True}, "given true. Allowed: 1, 2 or auto."),
        ({"local_node_cpus": "a-b"}, 'given "a-b". Allowed: CPU numbers and ranges'),
        ({"local_node_cpus": "3-1"}, 'given "3-1". Allowed: CPU numbers and ranges'),
        ({"local_node_cpus": [0, -1]}, "given [0, -1]. Allowed: CPU numbers and"),
        ({"local_node_cpus": True}, "given true. Allowed: CPU numbers and ranges"),
        ({"memory_nodes": ["host"]}, "'host' is not an address. Allowed: HOST:PORT"),
        ({"memory_nodes": [7600]}, "given [7600]. Allowed: a list of HOST:PORT"),
        ({"memory_nodes": {"a": 1}}, 'given {"a": 1}. Allowed: a list of HOST:PORT'),
        ({"standby_nodes": ["host"]}, "'host' is not an address"),
        ({"ray_device": "tpu"}, 'given "tpu". Allowed: cpu or cuda.'),
        ({"ray_resources": [1]}, "given [1]. Allowed: an object of amounts above 0"),
        ({"ray_resources": "x"}, 'given "x". Allowed: an object of amounts above 0'),
        ({"ray_resources": {}}, "given {}. Allowed: an object of amounts above 0"),
        ({"ray_resources": {"a": True}}, 'given {"a": true}. Allowed: an object of'),
        ({"ray_resources": {"a": 0}}, "given 0. Allowed: an object of amounts above"),
        ({"partition": "layers"}, 'given "layers". Allowed: heads, blocks or auto.'),
        ({"on_node_loss": "ignore"}, 'given "ignore". Allowed: recover or fail.'),
        ({"request_timeout_s": -1}, "given -1. Allowed: a number of seconds above 0."),
        ({"startup_timeout_s": None}, "given null. Allowed: a number of seconds"),
        ({"tls_cert": 3}, "given 3. Allowed: the path of a file."),
        ({"local_node_cpus": date(2026, 1, 2)}, 'given "2026-01-02". Allowed: CPU'),
        ({"kv_cache_gib": date(2026, 1, 2)}, 'given "2026-01-02". Allowed: a number'),
        ({"memory_nodes": [date(2026, 1, 2)]}, 'given ["2026-01-02"]. Allowed: a list'),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    """Three parts, in the words of who writes a YAML file."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        AttentionOffloadConfig.from_dict(options)
    (name,) = options
    text = str(error.value)
    assert text.startswith("attention-offload-config is wrong. ")
    assert "Write for example " in text
    assert not PYTHON.search(text)
    assert name in text or "is not an address" in text


def test_both_spellings_of_a_name() -> None:
    """None of the two wins."""
    message = (
        "kv_cache_gib was given twice, with - and with _. Allowed: one of the two "
        "spellings. Remove the other."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionOffloadConfig.from_dict({"kv-cache-gib": 4, "kv_cache_gib": 4})


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
