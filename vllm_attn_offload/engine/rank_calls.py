# SPDX-License-Identifier: Apache-2.0
"""Calls to an engine's ranks, which end where the host of a rank is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_attn_offload.client.attachment import Attachment, NodeFailure
from vllm_attn_offload.client.partition import PartitionKind
from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.engine.rank_options import (
    check_rank_options,
    without_offloading,
)
from vllm_attn_offload.errors import RankSilentError

_OPTIONS = "offload_options"


class RankCalls:
    """Asks all ranks of an engine, and does not wait forever for any.

    vLLM notices the loss of another host in a step; an idle engine has none.

    Args:
        call: vLLM's ``collective_rpc``, which raises TimeoutError.
        config: The engine's options.
    """

    def __init__(
        self, call: Callable[..., list[Any]], config: AttentionOffloadConfig
    ) -> None:
        self._call = call
        self._config = config

    def check_options(self) -> None:
        """Compare the options of all ranks with those of the engine.

        Raises:
            ValueError: A rank has other ones, or does not offload attention.
            RankSilentError: A rank does not answer.
        """
        try:
            ranks = self._ask(
                _OPTIONS, "for its options", self._config.startup_timeout_s
            )
        except RuntimeError as error:
            # vLLM gives the text of a rank's error and nothing else.
            if f"has no attribute '{_OPTIONS}'" not in str(error):
                raise
            raise without_offloading() from error
        check_rank_options(self._config.without_files(), ranks)

    def attach(
        self,
        attachments: list[list[Attachment]],
        partition: PartitionKind,
        within_s: float | None,
    ) -> list[NodeFailure | None]:
        """Give every rank its sessions.

        Addresses exist only at run time: they never enter the configuration, whose hash
        is part of the compile cache's key.

        Args:
            attachments: Per rank, one per memory node.
            partition: What is divided between the nodes.
            within_s: What is left of a recovery; None at start.

        Returns:
            Each rank's failure, if any.

        Raises:
            RankSilentError: A rank does not answer.
        """
        # A rank may wait that long for each node, and then says so.
        patience_s = (1 + len(attachments[0])) * self._config.request_timeout_s
        if within_s is None:
            timeout_s = self._config.startup_timeout_s + patience_s
        else:
            timeout_s = max(within_s, patience_s)
        arguments = attachments, partition
        what = "to connect to the memory nodes"
        return self._ask("attach_memory_nodes", what, timeout_s, arguments)

    def discard_step(self, within_s: float) -> None:
        """Have every rank forget the step that it executed last.

        Raises:
            RankSilentError: A rank does not answer.
        """
        timeout_s = max(within_s, self._config.request_timeout_s)
        self._ask("discard_step", "to forget a step", timeout_s)

    def _ask(
        self, method: str, what: str, timeout_s: float, arguments: tuple[Any, ...] = ()
    ) -> list[Any]:
        try:
            return self._call(method, timeout=timeout_s, args=arguments)
        except TimeoutError as error:
            raise RankSilentError(
                f"A rank of this engine was asked {what} and has not answered for "
                f"{timeout_s:.0f} s; its host may be lost. Allowed: an engine with all "
                "of its ranks. Look at the logs of its hosts, and start all of them "
                "again."
            ) from error
