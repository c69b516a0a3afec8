# SPDX-License-Identifier: Apache-2.0
"""Checks that import vLLM: hooks, patches, and whether an engine can be configured.

Run as a module. It reads one JSON object from stdin and writes a finding per line, each
as soon as it is known: what comes next may end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.hooks.hook_table import HookTable, known_releases
from vllm_attn_offload.hooks.signature import ABSENT
from vllm_attn_offload.versions import TESTED_VLLM, is_tested, untested_message

_Reply = Finding | dict[str, int]
_SHOWN_NAMES = 3
_STDOUT, _STDERR = 1, 2
#: Of <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Answer one request."""
    # Looking through what vLLM makes of its modules takes long, and this process ends.
    gc.disable()
    request = json.load(sys.stdin)
    _end_with(request["parent"])
    with os.fdopen(os.dup(_STDOUT), "w") as out:
        os.dup2(_STDERR, _STDOUT)
        for reply in _replies(request):
            line = reply if isinstance(reply, dict) else dataclasses.asdict(reply)
            out.write(json.dumps(line) + "\n")
            out.flush()
    return 0


def _end_with(parent: int) -> None:
    """Have this process killed when the one that asked ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def _replies(request: dict[str, Any]) -> Iterator[_Reply]:
    installed = HookTable.of_source()
    yield _version(installed.version)
    yield _hooks(installed)
    patches = _patches()
    yield patches
    if request["model"] and patches.severity == "ok":
        yield from _configuration(request)


def _version(version: str) -> Finding:
    if is_tested(version):
        return Finding.ok("vLLM", f"{version}, which this release is for")
    supported = " and ".join(f"{each}.x" for each in TESTED_VLLM)
    return Finding.of_error("vLLM", untested_message(version), f"vLLM {supported}")


def _hooks(installed: HookTable) -> Finding:
    """Compare signatures of what we use of vLLM; it is read, not imported."""
    known = known_releases()
    release = installed.release if installed.release in known else known[-1]
    changes = installed.differences(HookTable.of_release(release))
    # A name that the table lacks is a new use of ours, not a change of vLLM's.
    differing = [each for each in changes if each.before != ABSENT]
    if not differing:
        count = len(installed.signatures)
        return Finding.ok("hooks", f"{count} names are as in vLLM {release}")
    absent = [each for each in differing if each.now == ABSENT]
    shown = (absent or differing)[:_SHOWN_NAMES]
    names = ", ".join(each.name for each in shown)
    more = len(differing) - len(shown)
    # What is called differently may still do; what is gone does not.
    finding = Finding.fail if absent else Finding.warn
    return finding(
        "hooks",
        f"{len(differing)} name(s) of vLLM differ from {release}: {names}"
        + (f" and {more} more" if more > 0 else ""),
        f"a vLLM whose names are as in {' or '.join(known)}",
        "Install one of these; vllm-attn-offload hooks shows each difference.",
    )


def _patches() -> Finding:
    """Apply the patches, as the plugin does when vLLM loads it."""
    try:
        from vllm_attn_offload import patches
    except Exception as error:  # of all that vLLM imports, any
        return _not_importable(error)
    try:
        patches.apply_patches()
    except patches.PatchError as error:
        return Finding.of_error("patches", error, "a vLLM that they were written for")
    except Exception as error:  # likewise
        return _not_importable(error)
    return Finding.ok("patches", f"{len(patches.PATCHES)} of vLLM's command line apply")


def _not_importable(error: Exception) -> Finding:
    return Finding.fail(
        "patches",
        f"vLLM cannot be imported: {error}",
        "a vLLM that can be imported",
        "Run: python -c 'import vllm.engine.arg_utils', and install what it misses.",
    )


def _configuration(request: dict[str, Any]) -> Iterator[_Reply]:
    """Configure the engine as ``vllm serve`` would; nothing is started."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    said = io.StringIO()
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = [
        *("--model", request["model"], "--skip-tokenizer-init"),
        *("--attention-offload-config", json.dumps(request["options"])),
        *request["engine_options"],
    ]
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(arguments)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except SystemExit:
        last = (said.getvalue().strip().splitlines() or ["no message"])[-1]
        _, _, problem = last.partition("error: ")
        yield _refused(problem or last)
        return
    except Exception as error:  # of all that vLLM checks, any
        for line in _lines(str(error)):
            yield _refused(line)
        return
    model = config.model_config
    yield {"max_model_len": model.max_model_len}
    yield Finding.ok(
        "engine",
        f"vLLM would offload {model.architecture} in "
        f"{str(model.dtype).removeprefix('torch.')}, up to {model.max_model_len:,} "
        "tokens a request",
    )


def _lines(text: str) -> list[str]:
    """One line per refused feature, or all of what vLLM says."""
    ours = [line for line in text.splitlines() if line.startswith("Attention off")]
    return ours or [text]


def _refused(problem: str) -> Finding:
    return Finding.of_error(
        "engine",
        problem,
        "a model and options that vLLM and attention offloading both take",
        "Correct what it names; vllm serve would say the same.",
    )


if __name__ == "__main__":
    sys.exit(main())
