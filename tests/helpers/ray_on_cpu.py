# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM place workers by Ray on CPUs: each takes one of a host's logical GPUs.

vLLM does that on GPUs only. A plugin of it says otherwise in its own processes, and a
hook of Ray in workers, which ask before they load plugins.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_NAME = "ray_on_cpu"
_METADATA = "Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 1\n"


def register() -> None:
    """Name the resource that a worker takes."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def install(directory: Path) -> dict[str, str]:
    """Install this module as a plugin of vLLM.

    Args:
        directory: Receives the plugin.

    Returns:
        Variables of a server that has it, and whose workers have it.
    """
    shutil.copy(__file__, directory)
    info = directory / f"{_NAME}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA)
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{_NAME} = {_NAME}:register\n"
    )
    path = {"PYTHONPATH": str(directory)}
    job = {"worker_process_setup_hook": f"{_NAME}.register", "env_vars": path}
    return {**path, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": job})}
