# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload hooks`: what the installed vLLM changed of what is used of it."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from vllm_attn_offload.hooks.hook_table import Difference, HookTable, known_releases


def add_hooks(commands: Any) -> None:
    """Add the sub-command to a parser's."""
    parser = commands.add_parser(
        "hooks",
        help="compare what is used of vLLM with what it was written for",
        description="Compare signatures of what this package imports, overrides and "
        "patches of vLLM, and of listed names that it reaches through objects, with "
        "those of the version that it was written for. "
        "vLLM is read, not imported. The exit status is 1 where they differ.",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="DIR",
        help="a package 'vllm' other than the installed one, as in an unpacked wheel",
    )
    parser.add_argument(
        "--against",
        metavar="X.Y",
        help="a release with a table; default: the same one, or else the newest",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the table of this release into the package (for maintainers)",
    )


def run_hooks(args: argparse.Namespace) -> int:
    """Print the differences; returns 1 where there are some.

    Raises:
        ValueError: There is no such vLLM or table.
    """
    given = args.against and HookTable.of_release(args.against)
    # Looking through the syntax trees of all modules takes as long as making them, and
    # this process ends with them.
    gc.disable()
    installed = HookTable.of_source(args.vllm)
    if args.write:
        _say(f"{installed.write()}: {len(installed.signatures)} hooks")
        return 0
    known = known_releases()
    same = installed.release if installed.release in known else known[-1]
    written_for = given or HookTable.of_release(same)
    differences = installed.differences(written_for)
    _say(
        f"{len(installed.signatures)} hooks into vLLM {installed.version}; "
        f"{len(differences)} differ from vLLM {written_for.version}'s."
    )
    for each in differences:
        _say(_described(each, written_for.version, installed.version))
    return 1 if differences else 0


def _described(difference: Difference, before: str, now: str) -> str:
    use = difference.use
    places = f" in {', '.join(sorted(use.files))}" if use.files else ""
    how = f"{', '.join(sorted(use.how))}{places}" if use.how else "no longer used"
    width = max(len(before), len(now))
    return (
        f"\n{difference.name} ({how})\n"
        f"  {before:{width}} {difference.before}\n"
        f"  {now:{width}} {difference.now}"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
