# SPDX-License-Identifier: Apache-2.0
"""The commands of `vllm-attn-offload` and what ``--help`` says of them."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from vllm_attn_offload.commands import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_commands_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written twice, because ``--help`` imports none of them."""
    text, load = COMMANDS[name]
    add, _ = load()
    own = argparse.ArgumentParser()
    add(own.add_subparsers())
    assert " ".join(text.split()) in " ".join(own.format_help().split())
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert text in " ".join(capsys.readouterr().out.split())


def test_help_imports_no_command() -> None:
    script = (
        "import sys\nfrom vllm_attn_offload.commands import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'pydantic', 'msgspec', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["bogus", "plan"], ["plan"]])
def test_wrong_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With all names to choose from."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    if arguments[:1] == ["bogus"]:
        assert all(repr(name) in said for name in COMMANDS)
