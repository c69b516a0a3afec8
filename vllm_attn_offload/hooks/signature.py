# SPDX-License-Identifier: Apache-2.0
"""Signatures of definitions in source, in one line each."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from vllm_attn_offload.hooks.source_tree import Definition, SourceTree, dotted_name

ABSENT = "absent"
_DECORATORS = ("property", "cached_property", "classmethod", "staticmethod")


def signature(tree: SourceTree, name: str, *, is_called: bool) -> str:
    """Describe what vLLM calls ``name``: names of parameters and their defaults.

    Args:
        tree: Where it is defined.
        name: Dotted, from any module that has it.
        is_called: Classes are described by what makes one.
    """
    found = tree.find(name)
    if found is None:
        return ABSENT
    node = found.node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _function(node)
    if isinstance(node, ast.Module):
        return "module"
    if not isinstance(node, ast.ClassDef):
        return "attribute"
    return f"class{_constructor(tree, found)}" if is_called else "class"


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    decorators = [dotted_name(each).split(".")[-1] for each in node.decorator_list]
    kinds = [each for each in decorators if each in _DECORATORS]
    kinds += ["async"] if isinstance(node, ast.AsyncFunctionDef) else []
    return " ".join([*kinds, f"({_parameters(node.args)})"])


def _parameters(arguments: ast.arguments) -> str:
    """Without types, which change more often than what they stand for."""
    bare = copy.deepcopy(arguments)
    for node in ast.walk(bare):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(bare)


def _constructor(tree: SourceTree, found: Definition) -> str:
    """Its own, an inherited one, or the fields of a dataclass."""
    ancestry = list(tree.ancestry(found))
    for each in ancestry:
        method = tree.own_member(each, "__init__")
        if method and isinstance(method.node, ast.FunctionDef):
            return f"({_parameters(method.node.args)})"
    fields = {name: None for each in reversed(ancestry) for name in _fields(each.node)}
    return f"({', '.join(fields)})" if fields else "(...)"


def _fields(node: ast.AST) -> Iterator[str]:
    assert isinstance(node, ast.ClassDef)
    for part in node.body:
        if not isinstance(part, ast.AnnAssign):
            continue
        if "ClassVar" not in ast.unparse(part.annotation):
            yield ast.unparse(part.target) + ("=" if part.value else "")
