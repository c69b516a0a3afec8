# SPDX-License-Identifier: Apache-2.0
"""Finds the C library that ``setup.py`` built.

Kernels and transports share it; the transports load it without torch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TypeVar

ABI_VERSION = 9

_LibraryT = TypeVar("_LibraryT", bound=ctypes.CDLL)


def find_library() -> Path | None:
    """The built library, or None where the package was installed without a compiler."""
    path = Path(__file__).with_name("_native.lib.so")
    return path if path.exists() else None


def check_version(library: ctypes.CDLL, path: Path) -> None:
    """Refuse a library that was built from other sources.

    Raises:
        RuntimeError: Its interface is not the one of this package.
    """
    found = library.ao_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(
            f"{path} has interface version {found}; this package needs {ABI_VERSION}. "
            "Install the package again; in a checkout: `pip install -e .`."
        )


def open_library(kind: type[_LibraryT]) -> _LibraryT | None:
    """The library, or None where the package was installed without a compiler.

    Args:
        kind: ``ctypes.CDLL``, whose calls give up the GIL, or ``ctypes.PyDLL``.

    Raises:
        RuntimeError: The library was built from other sources than this package's.
    """
    path = find_library()
    if path is None:
        return None
    library = kind(str(path))
    check_version(library, path)
    return library
