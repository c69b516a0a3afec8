# SPDX-License-Identifier: Apache-2.0
"""What ``vllm serve`` offloads with, by the parser of that command."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_attn_offload.patches import apply_patches, revert_patches

from vllm_attn_offload.config import AttentionOffloadConfig

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser


def serve_options(command: Sequence[str]) -> AttentionOffloadConfig:
    """Read the arguments of ``vllm``, the verb among them.

    Raises:
        SystemExit: An argument does not exist or has a wrong value.
    """
    verb, *arguments = command
    assert verb == "serve"
    apply_patches()
    try:
        namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        namespace.model = namespace.model_tag
        additional = AsyncEngineArgs.from_cli_args(namespace).additional_config
    finally:
        revert_patches()
    config = AttentionOffloadConfig.from_additional_config(additional)
    assert config is not None
    return config
