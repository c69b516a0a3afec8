# SPDX-License-Identifier: Apache-2.0
"""What this package's source uses of vLLM."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_attn_offload.hooks.reached_names import REACHED
from vllm_attn_offload.hooks.source_tree import Definition, SourceTree, dotted_name

OWN = "vllm_attn_offload"
THEIRS = "vllm"
#: Imports of vLLM, patches by name, and classes that may extend one of its classes.
_MAY_USE = re.compile(r"^ *(from|import) vllm\b|\bPatch\(|^class \w+\(", re.M)


@dataclass
class Use:
    """How, and in which files, a name of vLLM is used."""

    how: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def used_names(tree: SourceTree) -> dict[str, Use]:
    """Return names of vLLM, as they are imported, and of members of its classes.

    Args:
        tree: Of both packages.
    """
    uses: defaultdict[str, Use] = defaultdict(Use)
    for name in REACHED:
        uses[name].how.add("reached")
    for module, path in tree.modules(OWN):
        if not _MAY_USE.search(path.read_text("utf-8")):
            continue
        shown = module.removeprefix(f"{OWN}.").replace(".", "/") + ".py"
        source = tree.module(module)
        for name, how in (*_imported(tree, source), *_of_classes(tree, module, source)):
            uses[name].how.add(how)
            uses[name].files.add(shown)
    return dict(uses)


def _imported(tree: SourceTree, source: ast.Module) -> Iterator[tuple[str, str]]:
    # Of two places where versions have a name, both.
    local: defaultdict[str, list[str]] = defaultdict(list)
    nodes = list(ast.walk(source))
    for name, full in _import_names(nodes):
        local[name].append(full)
        # `import vllm` alone says nothing.
        if full != THEIRS:
            yield full, "imported"
    for node in nodes:
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            yield from ((full, "called") for full in _full_names(tree, local, name))
            if name.split(".")[-1] == "Patch":
                yield from _patched(source, node)
        elif isinstance(node, ast.Attribute):
            name = dotted_name(node)
            yield from ((full, "read") for full in _full_names(tree, local, name))


def _full_names(
    tree: SourceTree, local: dict[str, list[str]], name: str
) -> Iterator[str]:
    """Yield an imported name, or a member of an imported module or class."""
    first, dot, rest = name.partition(".")
    for each in local.get(first, ()):
        full = f"{each}{dot}{rest}"
        owner = tree.find(full.rpartition(".")[0]) if dot else None
        if not dot or (owner and isinstance(owner.node, ast.Module | ast.ClassDef)):
            yield full


def _import_names(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            if node.module.split(".")[0] == THEIRS:
                for alias in node.names:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == THEIRS:
                    yield alias.asname or THEIRS, alias.name if alias.asname else THEIRS


def _patched(source: ast.Module, call: ast.Call) -> Iterator[tuple[str, str]]:
    constants = {
        target.id: node.value
        for node in source.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    given = {}
    for keyword in call.keywords:
        value: ast.expr = keyword.value
        if isinstance(value, ast.Name):
            value = constants.get(value.id, value)
        if isinstance(value, ast.Constant):
            given[keyword.arg] = str(value.value)
    parts = [given.get(name) for name in ("module", "owner", "attribute")]
    named = list(filter(None, parts))
    if len(named) == len(parts):
        yield ".".join(named), "patched"


def _of_classes(
    tree: SourceTree, module: str, source: ast.Module
) -> Iterator[tuple[str, str]]:
    """Yield what classes of ours override and use of those of vLLM they extend."""
    for node in source.body:
        found = isinstance(node, ast.ClassDef) and tree.find(f"{module}.{node.name}")
        if not found:
            continue
        ancestry = list(tree.ancestry(found))
        theirs = [each for each in ancestry if each.module.split(".")[0] == THEIRS]
        ours = [each for each in ancestry if each not in theirs]
        for each in ours if theirs else ():
            assert isinstance(each.node, ast.ClassDef)
            yield from _overridden(tree, each.node, theirs)
            yield from _inherited(tree, each.node, ours, theirs)


def _overridden(
    tree: SourceTree, node: ast.ClassDef, theirs: list[Definition]
) -> Iterator[tuple[str, str]]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            for owner in theirs:
                found = tree.own_member(owner, method.name)
                if found and not found.is_instance:
                    yield found.qualified, "overridden"


def _inherited(
    tree: SourceTree,
    node: ast.ClassDef,
    ours: list[Definition],
    theirs: list[Definition],
) -> Iterator[tuple[str, str]]:
    for part in ast.walk(node):
        if not isinstance(part, ast.Attribute) or not isinstance(part.ctx, ast.Load):
            continue
        if dotted_name(part.value) not in ("self", "cls"):
            continue
        if any(tree.own_member(each, part.attr) for each in ours):
            continue
        found = (tree.own_member(each, part.attr) for each in theirs)
        if (first := next(filter(None, found), None)) is not None:
            yield first.qualified, "used"
