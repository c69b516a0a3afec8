# SPDX-License-Identifier: Apache-2.0
"""Compares the options with which the hosts of one engine were started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_attn_offload.config import written

_ADVICE = "Start every host with the same options."


def check_rank_options(
    leader: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse ranks that compute with other options than the engine.

    Args:
        leader: The engine's options by name, without files.
        ranks: Those of each rank.

    Raises:
        ValueError: A rank has other ones.
    """
    for rank, options in enumerate(ranks):
        for name in sorted(leader.keys() | options.keys()):
            ours, theirs = leader.get(name), options.get(name)
            if theirs != ours:
                raise ValueError(
                    f"Rank {rank} was started with {name}={written(theirs)}, and the "
                    f"first host with {name}={written(ours)}. Allowed: one value on "
                    f"all hosts of an engine. {_ADVICE}"
                )


def without_offloading() -> ValueError:
    """Return the error for a rank that runs a worker of vLLM."""
    return ValueError(
        "A rank of this engine was started without attention offloading. Allowed: all "
        f"ranks with it, or none. {_ADVICE}"
    )
