# SPDX-License-Identifier: Apache-2.0
"""The patches fit the installed vLLM, and come off without a trace."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_attn_offload.patches import (
    PATCHES,
    Patch,
    PatchError,
    apply_patches,
    revert_patches,
)
from vllm_attn_offload.patches.patch import PATCH_FREE

from vllm_attn_offload.engine import args, executor_choice
from vllm_attn_offload.versions import vllm_version

OWNERS = [(resolve_obj_by_qualname(f"{p.module}.{p.owner}"), p) for p in PATCHES]
COMMAND_LINES = [
    [],
    ["--dtype", "float32", "--max-num-seqs", "7"],
    ["--additional-config.other", "2", "--block-size", "32", "--enforce-eager"],
    ["--compilation-config.mode", "0", "-tp", "2", "--no-enable-prefix-caching"],
]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """vLLM as it is without us, though it has loaded the plugin in this process."""
    load_general_plugins()
    revert_patches()
    yield
    revert_patches()


def descriptors() -> list[Any]:
    return [vars(owner)[patch.attribute] for owner, patch in OWNERS]


def test_check_accepts_the_installed_vllm() -> None:
    for patch in PATCHES:
        patch.check()
        assert not patch.is_applied()


def test_apply_twice_is_once() -> None:
    before = descriptors()
    apply_patches()
    once = descriptors()
    assert all(patch.is_applied() for patch in PATCHES)
    assert not any(map(lambda old, new: old is new, before, once))
    apply_patches()
    assert all(map(lambda old, new: old is new, once, descriptors()))
    EngineArgs.add_cli_args(FlexibleArgumentParser())


def test_revert_restores_the_same_objects() -> None:
    before = descriptors()
    for _ in range(2):
        apply_patches()
        revert_patches()
        revert_patches()
        assert all(map(lambda old, new: old is new, before, descriptors()))


def test_wrappers_keep_name_and_signature() -> None:
    original = EngineArgs.create_engine_config
    apply_patches()
    assert EngineArgs.create_engine_config is not original
    assert inspect.unwrap(EngineArgs.create_engine_config) is original
    assert EngineArgs.create_engine_config.__doc__ == original.__doc__


@pytest.mark.parametrize("arguments", COMMAND_LINES)
def test_parsing_other_flags_is_unchanged(smollm2: str, arguments: list[str]) -> None:
    def parse() -> EngineArgs:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        return EngineArgs.from_cli_args(
            parser.parse_args(["--model", smollm2, *arguments])
        )

    before = dataclasses.asdict(parse())
    apply_patches()
    assert dataclasses.asdict(parse()) == before


def test_another_signature_is_refused() -> None:
    """The message names both signatures and the command line without patches."""
    (patch,) = [item for item in PATCHES if item.attribute == "from_cli_args"]
    other = dataclasses.replace(patch, parameters=("cls", "args", "env"))
    before = descriptors()
    with pytest.raises(PatchError) as error:
        other.apply()
    expected = (
        "Patch 'engine_args.from_cli_args' expects vllm.engine.arg_utils.EngineArgs."
        "from_cli_args(cls, args, env), found (cls, args) in vLLM " + vllm_version()
    )
    assert str(error.value).startswith(expected)
    for option in ("--distributed-executor-backend", "--worker-cls"):
        assert option in str(error.value)
    assert all(map(lambda old, new: old is new, before, descriptors()))


def wrap_again(name: str) -> Any:
    """Somebody else's decorator on top of ours."""
    ours = getattr(EngineArgs, name)

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return theirs


def test_revert_refuses_where_others_wrapped_us() -> None:
    patch: Patch = PATCHES[2]
    patch.apply()
    ours = vars(EngineArgs)[patch.attribute]
    setattr(EngineArgs, patch.attribute, wrap_again(patch.attribute))
    with pytest.raises(PatchError, match="was wrapped again after patch"):
        patch.revert()
    setattr(EngineArgs, patch.attribute, ours)
    patch.revert()
    assert not patch.is_applied()


def test_readme_lists_the_patches(root: Path) -> None:
    rows = re.findall(
        r"^\| `(.+)` \| `(.+)` \| (.+) \| (.+) \| (.+) \|$",
        (root / "patches" / "README.md").read_text(),
        re.MULTILINE,
    )
    listed = [(name, target, why, when) for name, target, why, _, when in rows]
    assert listed == [
        (patch.name, patch.target, patch.reason, patch.remove_when) for patch in PATCHES
    ]


def test_class_paths(root: Path) -> None:
    """What names a class by its path, in options and in prose, names one that is."""
    names = vars(args) | vars(executor_choice)
    paths = {path for name, path in names.items() if name.endswith("_CLS")}
    assert len(paths) == 6
    for path in paths:
        assert isinstance(resolve_obj_by_qualname(path), type)
    for text in (PATCH_FREE, (root / "README.md").read_text()):
        named = re.findall(r"vllm_attn_offload\.[a-z_.]+\.[A-Z]\w+", text)
        assert (
            {executor_choice.EXECUTOR_CLS, args.CPU_WORKER_CLS} <= set(named) <= paths
        )
