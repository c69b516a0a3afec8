# SPDX-License-Identifier: Apache-2.0
"""A wrapper around one upstream function that is checked before it is applied."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_attn_offload.versions import is_tested, untested_message, vllm_version

PATCH_FREE = (
    "Without patches use: --distributed-executor-backend "
    "vllm_attn_offload.engine.executor.AttentionOffloadExecutor --worker-cls "
    "vllm_attn_offload.worker.cpu.CpuAttentionOffloadWorker --additional-config "
    """'{"attention_offload": {}}'."""
)
_MARK = "__vllm_attn_offload_patch__"


class PatchError(RuntimeError):
    """An upstream function is not what the patch was written for."""


@dataclass
class Patch:
    """Wraps ``target`` without changing its signature.

    Args:
        name: Short name for messages and the inventory.
        module: Upstream module.
        owner: Class in the module.
        attribute: Method of the class.
        parameters: Names of its parameters when the patch was written.
        wrap: Takes the original function and returns the replacement.
        reason: Why no official hook serves.
        remove_when: Change in vLLM that makes the patch unnecessary.
    """

    name: str
    module: str
    owner: str
    attribute: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    remove_when: str
    _original: Any = field(default=None, repr=False)
    _installed: Any = field(default=None, repr=False)

    @property
    def target(self) -> str:
        """Dotted name of what is wrapped."""
        return f"{self.module}.{self.owner}.{self.attribute}"

    def is_applied(self) -> bool:
        """Return True if the target is our wrapper now."""
        return hasattr(_function(self._descriptor()), _MARK)

    def check(self) -> None:
        """Compare version and signature with what the patch was written for.

        Raises:
            PatchError: They differ; the message says how to work without patches.
        """
        version = vllm_version()
        if not is_tested(version):
            raise PatchError(f"{untested_message(version)} {PATCH_FREE}")
        found = tuple(inspect.signature(_function(self._descriptor())).parameters)
        if found != self.parameters:
            expected = ", ".join(self.parameters)
            raise PatchError(
                f"Patch {self.name!r} expects {self.target}({expected}), found "
                f"({', '.join(found)}) in vLLM {version}. {PATCH_FREE}"
            )

    def apply(self) -> None:
        """Install the wrapper, unless it is installed already."""
        if self.is_applied():
            return
        self.check()
        descriptor = self._descriptor()
        original = _function(descriptor)
        wrapper: Any = functools.wraps(original)(self.wrap(original))
        setattr(wrapper, _MARK, self.name)
        if isinstance(descriptor, staticmethod | classmethod):
            wrapper = type(descriptor)(wrapper)
        setattr(self._owner(), self.attribute, wrapper)
        self._original, self._installed = descriptor, wrapper

    def revert(self) -> None:
        """Put the original back.

        Raises:
            PatchError: Somebody wrapped the function after us.
        """
        if self._original is None:
            return
        # The mark does not tell: functools.wraps copies it to whoever wraps us.
        if self._descriptor() is not self._installed:
            raise PatchError(
                f"{self.target} was wrapped again after patch {self.name!r}. Undo that "
                "wrapper first."
            )
        setattr(self._owner(), self.attribute, self._original)
        self._original = self._installed = None

    def _owner(self) -> type:
        return getattr(importlib.import_module(self.module), self.owner)

    def _descriptor(self) -> Any:
        # The raw attribute: it keeps static- and classmethods what they are.
        return self._owner().__dict__[self.attribute]


def _function(descriptor: Any) -> Callable[..., Any]:
    if isinstance(descriptor, staticmethod | classmethod):
        return descriptor.__func__
    return descriptor
