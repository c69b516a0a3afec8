# SPDX-License-Identifier: Apache-2.0
"""Parses the ``--attention-offload`` flags and configures the engine with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from pydantic.fields import FieldInfo

from vllm_attn_offload.config import (
    CONFIG_KEY,
    AttentionOffloadConfig,
    spelled_alike,
)
from vllm_attn_offload.logger import get_logger

from .patch import Patch

logger = get_logger(__name__)

_MODULE = "vllm.engine.arg_utils"
_REASON = "general plugins cannot add engine flags; only a platform gets the parser"
_REMOVE_WHEN = "vLLM gives general plugins a hook for flags"


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="AttentionOffloadConfig", description=AttentionOffloadConfig.__doc__
        )
        group.add_argument(
            "--attention-offload",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="Keep the KV cache on memory nodes and run attention there. With no "
            "other option, one memory node is started on this host.",
        )
        group.add_argument(
            "--attention-offload-config",
            type=_json_object,
            default=None,
            help="Options of attention offloading as a JSON object, or dotted: "
            "--attention-offload-config.kv_cache_gib 4. Implies --attention-offload.\n"
            + _options_help(),
        )
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        # Frontends may build namespaces without our flags.
        flag = vars(args).get("attention_offload")
        options = vars(args).get("attention_offload_config")
        if options is not None if flag is None else flag:
            engine_args.additional_config = with_options(
                engine_args.additional_config, options or {}
            )
            # One of several API servers parses what it is given before it has plugins.
            args.additional_config = engine_args.additional_config
            _add_middleware(args)
        elif options is not None:
            logger.info_once(
                "Attention is not offloaded (attention-offload is off): "
                "attention-offload-config is not used."
            )
        return engine_args

    return from_cli_args


def _add_middleware(args: argparse.Namespace) -> None:
    """Add ours to those of ``--middleware``, which are loaded later.

    Only the command lines of API servers have that option.
    """
    from vllm_attn_offload.engine.args import MIDDLEWARE

    given = vars(args).get("middleware")
    if given is not None:
        args.middleware = [*given, *(each for each in MIDDLEWARE if each not in given)]


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = AttentionOffloadConfig.from_additional_config(self.additional_config)
        if config is None:
            return original(self, *args, **kwargs)
        # Late: plain vLLM must not pay for what it does not use.
        from vllm_attn_offload.compatibility import check_arguments, check_supported
        from vllm_attn_offload.engine.args import (
            apply_to_engine_args,
            choose_scheduler,
            forget_with,
        )
        from vllm_attn_offload.engine.cpu_shares import check_cpus
        from vllm_attn_offload.engine.executor_choice import (
            is_follower,
            set_executor_of_leader,
        )
        from vllm_attn_offload.engine.node_metrics import export_node_metrics
        from vllm_attn_offload.engine.placement import check_local_memory
        from vllm_attn_offload.engine.reachable_nodes import check_reachable
        from vllm_attn_offload.engine.rust_frontend import warn_of_rust_frontend

        check_arguments(self)
        check_cpus(config)
        check_reachable(self, config)
        is_first = apply_to_engine_args(self)
        vllm_config = original(self, *args, **kwargs)
        check_supported(vllm_config)
        if is_follower(self):
            return vllm_config  # its workers hear from the leader
        set_executor_of_leader(vllm_config)
        if is_first:
            forget_with(vllm_config)
            check_local_memory(config, vllm_config)
            warn_of_rust_frontend(self, config)
        if config.on_node_loss == "recover":
            choose_scheduler(vllm_config, config.recovery_timeout_s)
        export_node_metrics(vllm_config, config)
        return vllm_config

    return create_engine_config


def with_options(
    additional_config: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Check options and merge them over those of ``additional_config``.

    Raises:
        ValueError: An unknown option or a bad value.
    """
    given = additional_config.get(CONFIG_KEY) or {}
    AttentionOffloadConfig.from_dict(given)
    merged = {**spelled_alike(given), **spelled_alike(options)}
    AttentionOffloadConfig.from_dict(merged)
    return {**additional_config, CONFIG_KEY: merged}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}). Give an object, such as "
            """'{"kv_cache_gib": 4}'."""
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object. Write for example "
            """'{"kv_cache_gib": 4}'."""
        )
    return value


def _options_help() -> str:
    fields: dict[str, FieldInfo] = vars(AttentionOffloadConfig)["__pydantic_fields__"]
    return "\n".join(
        f"- {name}: {' '.join((field.description or '').split())}"
        for name, field in fields.items()
    )


PATCHES = (
    Patch(
        name="engine_args.add_cli_args",
        module=_MODULE,
        owner="EngineArgs",
        attribute="add_cli_args",
        parameters=("parser",),
        wrap=_add_cli_args,
        reason=_REASON,
        remove_when=_REMOVE_WHEN,
    ),
    Patch(
        name="engine_args.from_cli_args",
        module=_MODULE,
        owner="EngineArgs",
        attribute="from_cli_args",
        parameters=("cls", "args"),
        wrap=_from_cli_args,
        reason="it copies dataclass fields only, so our flags would be dropped",
        remove_when=_REMOVE_WHEN,
    ),
    Patch(
        name="engine_args.create_engine_config",
        module=_MODULE,
        owner="EngineArgs",
        attribute="create_engine_config",
        parameters=("self", "usage_context", "headless"),
        wrap=_create_engine_config,
        reason="no hook sees the engine arguments before and the config after it",
        remove_when="vLLM lets a general plugin check and complete a VllmConfig",
    ),
)
