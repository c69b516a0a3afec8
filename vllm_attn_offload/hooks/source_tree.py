# SPDX-License-Identifier: Apache-2.0
"""Finds definitions in the source of packages, without importing them."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_Import = tuple[str, str]
_Entry = ast.AST | _Import


@dataclass(frozen=True)
class Definition:
    """Where a name is defined: ``node`` is an `ast.Module` for modules.

    ``is_instance``: it is assigned to ``self`` in a method.
    """

    module: str
    name: str
    node: ast.AST
    is_instance: bool = False

    @property
    def qualified(self) -> str:
        """Dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


class SourceTree:
    """Source of one or more packages.

    Args:
        roots: Directory of each package, by its dotted name.
    """

    def __init__(self, roots: dict[str, Path]) -> None:
        self._roots = roots
        self.module = functools.cache(self._module)
        self._in_module = functools.cache(self._find_in_module)
        self._path_of = functools.cache(self._find_path)
        self._names_of = functools.cache(_names_of)
        self._set_on_self = functools.cache(_set_on_self)

    def modules(self, package: str) -> Iterator[tuple[str, Path]]:
        """Yield name and file of all modules of a package, wherever parts of it are."""
        for root, directory in self._roots.items():
            if root.split(".")[0] != package:
                continue
            for path in sorted(directory.rglob("*.py")):
                parts = path.relative_to(directory).with_suffix("").parts
                yield ".".join((root, *parts)).removesuffix(".__init__"), path

    def find(self, dotted: str) -> Definition | None:
        """Return what a dotted name stands for, wherever it was imported from."""
        module = dotted
        names: list[str] = []
        while self._path_of(module) is None:
            module, _, name = module.rpartition(".")
            if not module:
                return None
            names.insert(0, name)
        found: Definition | None = Definition(module, "", self.module(module))
        for name in names:
            found = found and self.member(found, name)
        return found

    def member(self, owner: Definition, name: str) -> Definition | None:
        """Return what a module or class calls ``name``; classes inherit it."""
        if isinstance(owner.node, ast.Module):
            return self._in_module(owner.module, name)
        if not isinstance(owner.node, ast.ClassDef):
            return None
        found = (self.own_member(each, name) for each in self.ancestry(owner))
        return next(filter(None, found), None)

    def own_member(self, owner: Definition, name: str) -> Definition | None:
        """Return what a class defines itself, in its body or on ``self``."""
        assert isinstance(owner.node, ast.ClassDef)
        named = f"{owner.name}.{name}"
        entry = self._names_of(owner.node).get(name)
        if isinstance(entry, ast.AST):
            return Definition(owner.module, named, entry)
        node = self._set_on_self(owner.node).get(name)
        if node is None:
            return None
        return Definition(owner.module, named, node, is_instance=True)

    def ancestry(self, owner: Definition) -> Iterator[Definition]:
        """Yield a class and what it derives from, as far as its source is here."""
        assert isinstance(owner.node, ast.ClassDef)
        yield owner
        for base in owner.node.bases:
            name = dotted_name(base.value if isinstance(base, ast.Subscript) else base)
            found = name and self._named_in(owner.module, name)
            if found and isinstance(found.node, ast.ClassDef):
                yield from self.ancestry(found)

    def _named_in(self, module: str, dotted: str) -> Definition | None:
        first, *others = dotted.split(".")
        found = self._in_module(module, first)
        for name in others:
            found = found and self.member(found, name)
        return found

    def _module(self, name: str) -> ast.Module:
        path = self._path_of(name)
        assert path is not None
        return ast.parse(path.read_text("utf-8"))

    def _find_in_module(self, module: str, name: str) -> Definition | None:
        names = self._names_of(self.module(module))
        entry = names.get(name)
        if entry is None and self._path_of(f"{module}.{name}"):
            return self.find(f"{module}.{name}")
        if entry is None:
            stars = [key[1:] for key in names if key.startswith("*")]
            found = (self._imported(module, (star, name)) for star in stars)
            return next(filter(None, found), None)
        if isinstance(entry, tuple):
            return self._imported(module, entry)
        alias = isinstance(entry, ast.Assign) and dotted_name(entry.value)
        if alias and alias != name:
            return self._named_in(module, alias) or Definition(module, name, entry)
        return Definition(module, name, entry)

    def _imported(self, module: str, entry: _Import) -> Definition | None:
        source, name = entry
        if source.startswith("."):
            level = len(source) - len(source.lstrip("."))
            path = self._path_of(module)
            is_package = path is not None and path.name == "__init__.py"
            parts = module.split(".")
            base = parts[: len(parts) - level + is_package]
            source = ".".join(filter(None, (*base, source.lstrip("."))))
        return self.find(f"{source}.{name}" if name else source)

    def _find_path(self, module: str) -> Path | None:
        for package in sorted(self._roots, key=len, reverse=True):
            if module == package or module.startswith(f"{package}."):
                rest = module.removeprefix(package).strip(".")
                base = self._roots[package].joinpath(*filter(None, rest.split(".")))
                files = (base / "__init__.py", base.with_suffix(".py"))
                return next((path for path in files if path.is_file()), None)
        return None


def dotted_name(node: ast.AST) -> str:
    """Return ``a.b.c`` of an expression, or "" where it is another one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value)
        return owner and f"{owner}.{node.attr}"
    return ""


def _set_on_self(owner: ast.ClassDef) -> dict[str, ast.Attribute]:
    found: dict[str, ast.Attribute] = {}
    pending: list[ast.AST] = [*owner.body]
    # Statements only: expressions are most of a tree.
    while pending:
        statement = pending.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(statement, name, ())
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        for node in itertools.chain.from_iterable(map(ast.walk, targets)):
            if not isinstance(node, ast.Attribute):
                continue
            # Not the middle of `self.a.b = c`.
            is_set = isinstance(node.ctx, ast.Store)
            if is_set and dotted_name(node.value) == "self":
                found[node.attr] = node
    return found


def _names_of(owner: ast.Module | ast.ClassDef) -> dict[str, _Entry]:
    """Names of a module or of a class body; imports as (module, name)."""
    names: dict[str, _Entry] = {}
    for node in _statements(owner.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            for alias in node.names:
                key = f"*{source}" if alias.name == "*" else alias.asname or alias.name
                names[key] = (source, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                names[name] = (alias.name if alias.asname else name, "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id: node for each in targets if isinstance(each, ast.Name)}
    return names


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements; where there are alternatives, the first of them last."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.orelse)
            yield from _statements(node.body)
        elif isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)
            yield from _statements(node.body)
        else:
            yield node
