# SPDX-License-Identifier: Apache-2.0
"""Finds the C library that ``setup.py`` built.

Kernels and transports share it; the transports load it without torch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

ABI_VERSION = 8


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
