# SPDX-License-Identifier: Apache-2.0
"""Keeps ``attention-offload: false`` of a ``--config`` file, which vLLM drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .patch import Patch

_SWITCH = "attention-offload"


def _load_config_file(
    original: Callable[[Any, str], list[str]],
) -> Callable[[Any, str], list[str]]:
    def load_config_file(self: Any, file_path: str) -> list[str]:
        arguments = original(self, file_path)
        off = f"--no-{_SWITCH}"
        if _is_off(file_path) and off not in arguments:
            arguments.append(off)
        return arguments

    return load_config_file


def _is_off(file_path: str) -> bool:
    content = yaml.safe_load(Path(file_path).read_text()) or {}
    return any(
        key.replace("_", "-") == _SWITCH and value is False
        for key, value in content.items()
    )


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
