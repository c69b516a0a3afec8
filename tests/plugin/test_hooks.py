# SPDX-License-Identifier: Apache-2.0
"""The table of hooks is that of the installed vLLM, and shows what another changed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_attn_offload.patches import PATCHES

from vllm_attn_offload.hooks.hook_table import HookTable, known_releases
from vllm_attn_offload.hooks.signature import ABSENT
from vllm_attn_offload.versions import TESTED_VLLM

VLLM = Path(vllm.__file__).parent
COMMAND = [str(Path(sys.executable).with_name("vllm-attn-offload")), "hooks"]
#: A method that we override, as a later version might have it.
CHANGED = Path("v1", "executor", "abstract.py")
BEFORE = "def initialize_from_config(self, kv_cache_configs"
AFTER = "def initialize_from_config(self, plan, kv_cache_configs"


@pytest.fixture(scope="module")
def installed() -> HookTable:
    return HookTable.of_source()


@pytest.fixture
def later_vllm(tmp_path: Path) -> Path:
    """The installed vLLM but for one signature and its version."""
    for directory in (Path(), *reversed(CHANGED.parents[:-1])):
        target = tmp_path / "vllm" / directory
        target.mkdir()
        for entry in (VLLM / directory).iterdir():
            if directory / entry.name not in (*CHANGED.parents, CHANGED):
                (target / entry.name).symlink_to(entry)
    source = (VLLM / CHANGED).read_text("utf-8")
    assert source.count(BEFORE) == 1
    changed = tmp_path / "vllm" / CHANGED
    changed.write_text(source.replace(BEFORE, AFTER), "utf-8")
    version = tmp_path / "vllm" / "_version.py"
    version.unlink()
    version.write_text("__version__ = version = '0.99.1'\n", "utf-8")
    return tmp_path / "vllm"


def hooks(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=60, check=False
    )


def test_installed_vllm_is_that_of_the_table(installed: HookTable) -> None:
    """Otherwise see what changed, adapt, and `vllm-attn-offload hooks --write`."""
    written_for = HookTable.of_release(installed.release)
    changes = [(d.name, d.before, d.now) for d in installed.differences(written_for)]
    assert not changes
    assert written_for.version == installed.version == vllm.__version__.split("+")[0]


def test_every_supported_release_has_a_table(installed: HookTable) -> None:
    """Of all names that we use; what one of them lacks, another one has."""
    assert known_releases() == list(TESTED_VLLM)
    tables = {release: HookTable.of_release(release) for release in TESTED_VLLM}
    for release, table in tables.items():
        differing = set(table.signatures) ^ set(installed.signatures)
        assert not differing, f"write the table of vLLM {release} again"
    for name in installed.signatures:
        found = {table.signatures[name] for table in tables.values()}
        assert found != {ABSENT}, name


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("vllm.config.VllmConfig", "imported"),
        ("vllm.forward_context._forward_context", "read"),
        ("vllm.v1.attention.backends.registry.register_backend", "called"),
        ("vllm.v1.executor.abstract.Executor.initialize_from_config", "overridden"),
        ("vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model", "overridden"),
        ("vllm.v1.worker.cpu_worker.CPUWorker.compile_or_warm_up_model", "overridden"),
        ("vllm.v1.worker.cpu_worker.CPUWorker._should_warm_up_model", "used"),
        ("vllm.v1.core.sched.scheduler.Scheduler.running", "used"),
        ("vllm.v1.core.block_pool.BlockPool.get_num_free_blocks", "reached"),
        *((patch.target, "patched") for patch in PATCHES),
    ],
)
def test_how_a_hook_is_used(installed: HookTable, name: str, how: str) -> None:
    assert how in installed.uses[name].how


def test_parameters_are_those_that_python_sees(installed: HookTable) -> None:
    """For all functions whose module can be imported without a GPU."""
    compared = 0
    for name, text in installed.signatures.items():
        function = _function(name)
        if function is None or not text.endswith(")") or text.startswith("class"):
            continue
        declared = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0]
        assert isinstance(declared, ast.FunctionDef)
        given = declared.args
        names = [*given.posonlyargs, *given.args, *filter(None, [given.vararg])]
        names += [*given.kwonlyargs, *filter(None, [given.kwarg])]
        seen = inspect.signature(inspect.unwrap(function)).parameters
        assert [each.arg for each in names] == list(seen), name
        compared += 1
    assert compared > 80


def _function(name: str) -> Callable[..., Any] | None:
    owner, _, attribute = name.rpartition(".")
    try:
        found = inspect.getattr_static(resolve_obj_by_qualname(owner), attribute)
    except (ImportError, AttributeError, ValueError):
        try:
            found = resolve_obj_by_qualname(name)
        except (ImportError, AttributeError, ValueError):
            return None
    found = getattr(found, "__func__", None) or getattr(found, "fget", None) or found
    return found if inspect.isfunction(found) else None


def test_a_later_version_shows_what_it_changed(later_vllm: Path) -> None:
    """With both signatures, and our files that must follow."""
    shown = hooks("--vllm", str(later_vllm))
    assert shown.returncode == 1, shown.stderr
    newest = HookTable.of_release(known_releases()[-1]).version
    name = "vllm.v1.executor.abstract.Executor.initialize_from_config"
    (block,) = [text for text in shown.stdout.split("\n\n") if text.startswith(name)]
    title, before, now = block.strip().splitlines()
    assert "overridden in engine/executor.py" in title
    assert before.split() == [newest, "(self,", "kv_cache_configs)"]
    assert now.split() == ["0.99.1", "(self,", "plan,", "kv_cache_configs)"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--vllm", "/nowhere"), "/nowhere holds no vLLM. Give the directory of"),
        (("--against", "0.1"), "no table of hooks for vLLM 0.1. Allowed: 0.32, 0.33."),
    ],
)
def test_bad_options(options: tuple[str, ...], reason: str) -> None:
    refused = hooks(*options)
    assert refused.returncode == 2
    assert reason in refused.stderr
