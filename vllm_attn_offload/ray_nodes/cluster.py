# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster of this process: installed, connected, and what it has free."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
from types import ModuleType

from vllm_attn_offload.transport.address import Address

#: Actors of this package are found here, whatever namespace a job has.
NAMESPACE = "attn_offload"
_ADDRESS_VARIABLE = "RAY_ADDRESS"
_CONNECT_TIMEOUT_S = 5.0
_START = (
    "Start one with 'ray start --head' on one host and 'ray start --address "
    "HOST:6379' on the others, and set RAY_ADDRESS=HOST:6379."
)
_TOKEN = (
    "A cluster with token authentication needs the same RAY_AUTH_MODE and token file "
    "on every host."
)


def check_installed() -> None:
    """Raise if Ray is missing, without the time that importing it takes.

    Raises:
        ImportError: The message says what to install.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError(
            "Ray was asked for and is not installed here. Allowed: Ray 2.48 or newer, "
            "on every host of the cluster. Run: pip install 'vllm-attn-offload[ray]'"
        )


def import_ray() -> ModuleType:
    """Import Ray, which only engines and commands that use it need.

    Raises:
        ImportError: The message says what to install.
    """
    check_installed()
    import ray

    return ray


def connect(*, show_logs: bool = False) -> ModuleType:
    """Join the running cluster, unless this process has; never start one.

    Args:
        show_logs: Print what actors of this process print, as vLLM does with workers.

    Returns:
        The module ``ray``.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no cluster, or it refuses this process.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray
    _check_reachable()
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            # RAY_ADDRESS goes first; without either a private cluster would start.
            "auto",
            namespace=NAMESPACE,
            log_to_driver=show_logs,
        )
    except (
        ConnectionError,
        ValueError,
        RuntimeError,
        ray.exceptions.RayError,
    ) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"Ray was asked for, and no cluster can be joined from here ({said}). "
            f"Allowed: a cluster that this host is part of. {_TOKEN} {_START}"
        ) from error
    finally:
        # Ray's own handler would end an engine before it leaves its memory nodes.
        if is_main and before is not None:
            signal.signal(signal.SIGTERM, before)
    return ray


def free_by_host() -> dict[str, dict[str, float]]:
    """Return what each live host of the cluster has free, by resource, by its id."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def _check_reachable() -> None:
    """Ray itself tries for a minute, and then ends the process.

    Raises:
        ValueError: Nobody listens at RAY_ADDRESS, or it is no HOST:PORT; or without
            it, nobody where this host's cluster was.
    """
    from ray._private.services import canonicalize_bootstrap_address

    given = os.environ.get(_ADDRESS_VARIABLE, "")
    named = f"RAY_ADDRESS={given} was given" if given else "Ray was asked for"
    try:
        if given in ("", "auto"):
            given = canonicalize_bootstrap_address("auto") or ""
            named += f", this host's cluster was at {given}"
        address = Address.parse(given)
        with socket.create_connection((address.host, address.port), _CONNECT_TIMEOUT_S):
            return
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{named}, and no cluster answers there ({error}). "
            f"Allowed: HOST:PORT of a running cluster's head, or auto. {_START}"
        ) from error
