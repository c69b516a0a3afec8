# SPDX-License-Identifier: Apache-2.0
"""The C library: whether it is there, and what this CPU lets it use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vllm_attn_offload.doctor.finding import Finding
from vllm_attn_offload.memory_node.extras import install_command, missing_modules
from vllm_attn_offload.native.attention import load_cpu_library

_NAME = "C library"
_CPUINFO = Path("/proc/cpuinfo")
#: What kernels use, in the words of the kernel.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512vbmi")
_REINSTALL = (
    "Install a wheel, or with a C++ compiler: pip install --force-reinstall --no-deps "
    "vllm-attn-offload"
)


def check_library() -> Iterator[Finding]:
    """Load the library and name its instruction set."""
    allowed = "the library of this release"
    try:
        library = load_cpu_library()
    except (OSError, RuntimeError) as error:
        yield Finding.of_error(_NAME, error, allowed, _REINSTALL)
        return
    if library is not None:
        yield _instructions(library.isa_names[0])
        return
    lost = "nothing attends on this CPU but torch, and no frame passes shared memory"
    if missing := missing_modules("torch"):
        yield Finding.fail(
            _NAME,
            f"it was not built, and there is no {missing} in its place",
            f"{allowed}, or torch",
            f"{_REINSTALL}; or: {install_command('torch')}",
        )
    else:
        yield Finding.warn(_NAME, f"it was not built: {lost}", allowed, _REINSTALL)


def _instructions(best: str) -> Finding:
    offered = [flag for flag in _FLAGS if flag in _cpu_flags()]
    offers = f"this CPU offers {', '.join(offered) or 'none of ' + ', '.join(_FLAGS)}"
    if best != "portable":
        return Finding.ok(_NAME, f"kernels use {best}; {offers}")
    return Finding.warn(
        _NAME,
        f"memory nodes of this CPU would attend with portable code; {offers}",
        "avx2, or any of avx512",
        "Run memory nodes on a CPU with one of these; an engine alone needs none.",
    )


def _cpu_flags() -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text(), re.M)
    return set(match[1].split()) if match else set()
