# SPDX-License-Identifier: Apache-2.0
"""Reads ``attention-offload`` of a ``--config`` file as people write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vllm_attn_offload.config import AttentionOffloadConfig, spelled_alike, written

from .patch import Patch

_SWITCH, _OPTIONS = "attention_offload", "attention_offload_config"
_ON_OR_OFF = {"true": True, "false": False}


def _load_config_file(
    original: Callable[[Any, str], list[str]],
) -> Callable[[Any, str], list[str]]:
    def load_config_file(self: Any, file_path: str) -> list[str]:
        try:
            arguments = original(self, file_path)
        except TypeError:
            # JSON has no dates, for example: say in which option, if it is one of ours.
            AttentionOffloadConfig.from_dict(_ours(file_path).get(_OPTIONS) or {})
            raise
        ours = _ours(file_path)
        if _SWITCH in ours:
            # vLLM drops a false of a flag that only a subcommand's parser knows.
            _remove(arguments, _SWITCH)
            no = "" if _is_on(ours[_SWITCH]) else "no-"
            arguments.append(f"--{no}attention-offload")
        if ours.get(_OPTIONS, "") is None:
            _remove(arguments, _OPTIONS)
        return arguments

    return load_config_file


def _ours(file_path: str) -> dict[str, Any]:
    """Return our keys of a file, with underscores.

    Raises:
        ValueError: One of them stands there in both spellings.
    """
    content = yaml.safe_load(Path(file_path).read_text()) or {}
    alike = (_SWITCH, _OPTIONS)
    return spelled_alike(
        {k: v for k, v in content.items() if str(k).replace("-", "_") in alike}
    )


def _is_on(value: object) -> bool:
    meant = _ON_OR_OFF.get(str(value).strip().lower())
    if meant is None:
        raise ValueError(
            f"attention-offload was given {written(value)} in the --config file. "
            "Allowed: true or false. Write for example attention-offload: true."
        )
    return meant


def _remove(arguments: list[str], name: str) -> None:
    """Remove a flag and its value, in any spelling."""
    names = [argument.replace("_", "-") for argument in arguments]
    for flag in (f"--{name}".replace("_", "-"), f"--no-{name}".replace("_", "-")):
        if flag in names:
            begin = names.index(flag)
            has_value = not (names[begin + 1 :] or ["--"])[0].startswith("--")
            del arguments[begin : begin + 1 + has_value]
            return


PATCHES = (
    Patch(
        name="config_file.load_config_file",
        module="vllm.utils.argparse_utils",
        owner="FlexibleArgumentParser",
        attribute="load_config_file",
        parameters=("self", "file_path"),
        wrap=_load_config_file,
        reason="it drops a false of a flag that only a subcommand's parser knows",
        remove_when="vLLM passes every false of a --config file on as --no-FLAG",
    ),
)
