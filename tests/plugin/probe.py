# SPDX-License-Identifier: Apache-2.0
"""Reports how vLLM looks in a fresh process: its commands and its engine config.

Run as a script with a model; prints one line of JSON last.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

OURS = ["--attention-offload-config.kv_cache_gib", "4"]
ATTRIBUTES = ("add_cli_args", "from_cli_args", "create_engine_config")


def build_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm``, as its main function makes it."""
    import vllm.entrypoints.cli.benchmark.main as benchmark
    import vllm.entrypoints.cli.serve as serve

    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(required=False, dest="subparser")
    for module in (serve, benchmark):
        for command in module.cmd_init():
            command.subparser_init(subparsers)
    return parser


def parse_commands(model: str) -> dict[str, Any]:
    """``additional_config`` of each command with our option, or "unrecognized"."""
    found: dict[str, Any] = {}
    parser = build_parser()
    for command in ("serve", "bench throughput", "bench latency"):
        arguments = [*command.split(), "--model", model, *OURS]
        if command == "serve":
            arguments = [command, model, *OURS]
        try:
            namespace = parser.parse_args(arguments)
        except SystemExit:
            found[command] = "unrecognized"
        else:
            # The server's command names its model in another place.
            namespace.model = model
            found[command] = EngineArgs.from_cli_args(namespace).additional_config
    return found


def describe_engine(model: str) -> dict[str, str]:
    """Everything about a plain engine that another process can compare."""
    engine_args = EngineArgs(model=model, additional_config={"other": 2})
    arguments = repr(dataclasses.asdict(engine_args))
    config = engine_args.create_engine_config()
    config.instance_id = ""
    # Objects without a repr show their address.
    return {
        "arguments": re.sub(r"0x[0-9a-f]+", "0x", arguments),
        "hash": config.compute_hash(),
        "config": re.sub(r"0x[0-9a-f]+", "0x", str(config)),
        **{
            field.name: re.sub(r"0x[0-9a-f]+", "0x", repr(getattr(config, field.name)))
            for field in dataclasses.fields(config)
        },
    }


def wrappers() -> list[Any]:
    return [vars(EngineArgs)[name] for name in ATTRIBUTES]


def probe_plugin() -> dict[str, Any]:
    """Whether the patches are there, and stay the same when registered again."""
    from vllm_attn_offload.patches import PATCHES

    before = [patch.is_applied() for patch in PATCHES]
    if not all(before):
        assert not any(before)
        return {"is_applied": False}
    installed = wrappers()
    from vllm_attn_offload.plugin import register

    register()
    is_same = all(map(lambda old, new: old is new, installed, wrappers()))
    return {"is_applied": True, "is_same_after_second_register": is_same}


def probe_untested_version(model: str) -> dict[str, Any]:
    """The same vLLM, when it says that it is another version."""
    from vllm_attn_offload.patches import PATCHES, revert_patches

    from vllm_attn_offload import LLM
    from vllm_attn_offload.plugin import register

    revert_patches()
    vllm.__version__ = "0.34.0"
    register()
    register()
    applied = any(patch.is_applied() for patch in PATCHES)
    try:
        LLM(model, attention_offload=True)
    except Exception as error:
        return {
            "is_applied": applied,
            "error": f"{type(error).__name__}: {error}",
        }
    return {"is_applied": applied, "error": ""}


def main() -> None:
    """Print the report."""
    model = sys.argv[1]
    # The parsers of `vllm bench` are built only for that command.
    sys.argv[1:] = ["bench"]
    load_general_plugins()
    report = {
        "commands": parse_commands(model),
        "engine": describe_engine(model),
        "plugin": probe_plugin(),
        "untested": probe_untested_version(model),
    }
    sys.stdout.write("\n" + json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
