# SPDX-License-Identifier: Apache-2.0
"""Every error text of the product; run as a script, it lists them for review."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vllm_attn_offload", "triton_kernels", "patches")
#: Between peers or inside the process; users see them in the log, as a cause at most.
INTERNAL = {
    "AttributeError",
    "BrokenPipeError",
    "ConnectionResetError",
    "NotImplementedError",
    "OSError",
    "ProtocolError",
    "TimeoutError",
}
#: Words of Python and pydantic that no user should have to know.
PYTHON = re.compile(
    r"__name__|\b(tuple|dict|str|int|bool|NoneType|pydantic|kwargs|isinstance|Mapping"
    r"|traceback|TypeError|ValueError|KeyError|valid (string|integer|number|boolean))\b"
)
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z{'\"])")
_RULE = "Unsupported"


@dataclass(frozen=True, slots=True)
class ErrorText:
    """One error as it stands in the source; ``{...}`` stands for what is filled in."""

    where: str
    error: str
    given: str
    allowed: str
    advice: str

    @property
    def text(self) -> str:
        """The whole message."""
        return " ".join(filter(None, (self.given, self.allowed, self.advice)))


def error_texts() -> Iterator[ErrorText]:
    """Yield the errors of all modules, in the order of their files."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield from _texts_of(path)


def _texts_of(path: Path) -> Iterator[ErrorText]:
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        *owner, name = ast.unparse(call.func).split(".")
        if owner == ["logger"]:
            continue
        where = f"{path.relative_to(ROOT)}:{call.lineno}"
        if name == _RULE:
            yield _rule(where, call)
        elif name.endswith("Error") or name == "error":
            yield from _message(where, name, call)


def _rule(where: str, call: ast.Call) -> ErrorText:
    feature, given, allowed, *advice = call.args
    text = f"{_render(feature)}: {ast.unparse(given)}."
    rest = [_render(each) for each in advice] or ["(the default advice)"]
    return ErrorText(where, _RULE, text, f"Allowed: {_render(allowed)}.", rest[0])


def _message(where: str, name: str, call: ast.Call) -> Iterator[ErrorText]:
    text = " ".join(_render(each) for each in call.args if _has_words(each))
    if text:
        given, *rest = _SENTENCE_END.split(text)
        yield ErrorText(where, name, given, " ".join(rest[:-1]), "".join(rest[-1:]))


def _has_words(node: ast.expr) -> bool:
    return any(
        isinstance(each, ast.Constant)
        and isinstance(each.value, str)
        and " " in each.value
        for each in ast.walk(node)
    )


def _render(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}"
            if isinstance(part, ast.FormattedValue)
            else _render(part)
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return _render(node.left) + _render(node.right)
    return f"{{{ast.unparse(node)}}}"


def main() -> None:
    """Write all texts, one part a line."""
    for each in error_texts():
        kind = " (internal)" if each.error in INTERNAL else ""
        lines = [f"{each.where} {each.error}{kind}", f"  given:   {each.given}"]
        if each.allowed or each.advice:
            lines += [f"  allowed: {each.allowed}", f"  do:      {each.advice}"]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
