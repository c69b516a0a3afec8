# SPDX-License-Identifier: Apache-2.0
"""Types of the options: they take a value in every way that people write it.

Command lines, YAML and JSON differ: ``1``, ``"1"`` and ``[1]`` mean the same list.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm_attn_offload.cpu_list import parse_cpu_list

_ADDRESSES = "a list of HOST:PORT, [IPV6]:PORT or unix:PATH"


@dataclass(frozen=True, slots=True)
class Allowed:
    """Says in an error which values an option takes."""

    text: str
    example: str


def _number(value: Any) -> Any:
    """Refuse ``true``, which would be 1; text is read later."""
    if isinstance(value, bool):
        raise ValueError  # `Allowed` says what is wrong
    return value


def _list_of(part: Callable[[Any], str]) -> Callable[[Any], tuple[str, ...]]:
    def parse(value: Any) -> tuple[str, ...]:
        if value is None:
            return ()  # a name in a YAML file with nothing behind it
        if isinstance(value, list | tuple):
            return tuple(map(part, value))
        return tuple(filter(None, map(str.strip, part(value).split(","))))

    return parse


def _addresses(value: Any) -> tuple[str, ...]:
    """Take a list, its JSON, or addresses between commas, which paths may hold."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        # An IPv6 address in brackets is no JSON.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    try:
        parts = _list_of(_text)(value)
    except ValueError:
        raise ValueError(f"Allowed: {_ADDRESSES}") from None
    if isinstance(value, str):
        return parts
    between = [
        [each] if each.startswith("unix:") else each.split(",") for each in parts
    ]
    return tuple(filter(None, (each.strip() for part in between for each in part)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _cpu(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return str(value)


def _cpus(value: Any) -> str:
    text = ",".join(_list_of(_cpu)(value))
    if text:
        parse_cpu_list(text)
    return text


def _micro_batches(value: Any) -> Any:
    text = str(_number(value)).strip().lower()
    return {"1": 1, "2": 2, "auto": "auto"}.get(text, value)


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _path(value: Any) -> str:
    return "" if value is None else os.path.expanduser(_text(value))


def _resources(value: Any) -> Any:
    parsed = json.loads(value) if isinstance(value, str) else value
    if isinstance(parsed, dict):
        return {name: _number(amount) for name, amount in parsed.items()}
    return parsed


Addresses = Annotated[
    tuple[str, ...],
    BeforeValidator(_addresses),
    Allowed(_ADDRESSES, "10.0.0.7:7600"),
]
Nodes = Annotated[
    tuple[str, ...],
    BeforeValidator(_addresses),
    Allowed(f"{_ADDRESSES}; or ray or ray:NAME alone", "10.0.0.7:7600"),
]
Device = Annotated[
    Literal["cpu", "cuda"], BeforeValidator(_lower), Allowed("cpu or cuda", "cpu")
]
Resources = Annotated[
    Annotated[
        dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        Field(min_length=1),
    ]
    | None,
    BeforeValidator(_resources),
    Allowed("an object of amounts above 0 by resource", '{"memory_node": 1}'),
]
Count = Annotated[
    int,
    BeforeValidator(_number),
    Field(ge=1, le=64),
    Allowed("a whole number from 1 to 64", "2"),
]
Cpus = Annotated[
    str, BeforeValidator(_cpus), Allowed("CPU numbers and ranges of them", "8-15")
]
Gib = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
    BeforeValidator(_number),
    Allowed("a number of GiB above 0", "4"),
]
Seconds = Annotated[
    float,
    BeforeValidator(_number),
    Field(gt=0, allow_inf_nan=False),
    Allowed("a number of seconds above 0", "30"),
]
SecondsOrZero = Annotated[
    float,
    BeforeValidator(_number),
    Field(ge=0, allow_inf_nan=False),
    Allowed("a number of seconds, 0 for none", "10"),
]
MicroBatches = Annotated[
    Literal[1, 2, "auto"],
    BeforeValidator(_micro_batches),
    Allowed("1, 2 or auto", "auto"),
]
PartitionOption = Annotated[
    Literal["heads", "blocks", "auto"],
    BeforeValidator(_lower),
    Allowed("heads, blocks or auto", "auto"),
]
NodeLoss = Annotated[
    Literal["recover", "fail"],
    BeforeValidator(_lower),
    Allowed("recover or fail", "recover"),
]
FilePath = Annotated[
    str, BeforeValidator(_path), Allowed("the path of a file", "~/node.pem")
]
