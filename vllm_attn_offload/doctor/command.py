# SPDX-License-Identifier: Apache-2.0
"""`vllm-attn-offload doctor`: its options, and the order of its checks."""

from __future__ import annotations

import argparse
import functools
from itertools import pairwise

from vllm_attn_offload.config import AttentionOffloadConfig
from vllm_attn_offload.doctor.c_library import check_library
from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.certificates import check_credentials
from vllm_attn_offload.doctor.check import Check, in_background, run_checks
from vllm_attn_offload.doctor.engine_process import EngineProcess
from vllm_attn_offload.doctor.exchange_probe import probe_exchange
from vllm_attn_offload.doctor.host_cpus import check_cpus, check_numa
from vllm_attn_offload.doctor.host_limits import check_descriptors, check_locked_memory
from vllm_attn_offload.doctor.host_memory import (
    check_huge_pages,
    check_memory,
    check_shared_memory,
)
from vllm_attn_offload.doctor.host_software import check_plugin, check_versions
from vllm_attn_offload.doctor.model_size import check_model, read_shape
from vllm_attn_offload.doctor.node_examination import NodeExamination
from vllm_attn_offload.doctor.options import add_options, given_model, given_options
from vllm_attn_offload.doctor.pool import check_pool
from vllm_attn_offload.doctor.report import Report
from vllm_attn_offload.seconds_option import seconds

DOCTOR_HELP = "find what would keep an engine or a memory node from serving"
_EPILOG = """examples:
  vllm-attn-offload doctor
  vllm-attn-offload doctor Qwen/Qwen3-0.6B --memory-nodes 10.0.0.7:7600,10.0.0.8:7600 \\
      --auth-token-file token
  vllm-attn-offload doctor ./Qwen3-8B --config engine.yaml \\
      --engine-options --max-model-len 32768
The exit status is 0 where it would serve, 1 where it would not, and 2 where the command
is wrong. Nothing is started or changed but by --probe, which opens a session."""
#: A busy host takes this long to import vLLM.
_ENGINE_DEADLINE_S = 120.0
_HOST = "this host"


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help=DOCTOR_HELP,
        description=DOCTOR_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default="", help="config.json, directory or hub model id")
    add("--json", action="store_true", help="print the findings as a JSON list")
    add(
        "--probe",
        action="store_true",
        help="also exchange layers with the nodes for some seconds, and time them",
    )
    add(
        "--timeout-s",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="deadline for every answer of a node (default: %(default)g)",
    )
    add_options(parser)
    add(
        "--engine-options",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="all that follows are more options of vllm serve, such as "
        "--max-model-len 8192",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Look at everything; returns 0 where it would serve, else 1.

    Raises:
        ValueError: A bad option.
    """
    case = _case(args)
    report = Report(args.json)
    with report:
        _look(_checks(case), report)
        if case.is_probing:
            # Alone, because everything else would be in its numbers.
            probe = functools.partial(probe_exchange, case, report.num_fails > 0)
            _look([Check("pool", "exchange", probe)], report)
    return report.close()


def _look(checks: list[Check], report: Report) -> None:
    report.await_check(checks[0])
    following = [after for _, after in pairwise([*checks, None])]
    for (check, findings), after in zip(run_checks(checks), following, strict=True):
        report.add(check.subject, findings)
        report.await_check(after)


def _case(args: argparse.Namespace) -> Case:
    options = given_options(args)
    model, extra = given_model(args), tuple(args.engine_options)
    if extra and not model:
        raise ValueError(
            f"--engine-options {extra[0]} was given without a model. Allowed: with "
            "MODEL, or a model in --config. Write MODEL in front of the options."
        )
    if args.config is not None:
        extra = ("--config", str(args.config), *extra)
    read = functools.partial(read_shape, model, extra)
    return Case(
        config=AttentionOffloadConfig.from_dict(options),
        options=options,
        model=model,
        engine_options=extra,
        shape=in_background(read) if model else None,
        timeout_s=args.timeout_s,
        is_probing=args.probe,
    )


def _checks(case: Case) -> list[Check]:
    """In the order in which they are shown; the slowest are last."""
    nodes = {each: NodeExamination(each, case) for each in case.addresses}
    engine = EngineProcess(case)
    checks = _host_checks(case)
    for address, node in nodes.items():
        subject = f"memory node {address}"
        checks.append(Check(subject, "node", node.run, node.deadline_s))
    if case.model:
        checks.append(Check("model", "configuration", lambda: check_model(case)))
    if case.is_engine_host:
        checks.append(Check("vLLM", "engine", engine.run, _ENGINE_DEADLINE_S))
    used = [nodes[each] for each in case.config.addresses]
    pool = functools.partial(check_pool, case, used, engine.max_model_len)
    checks.append(Check("pool", "pool", pool, _ENGINE_DEADLINE_S))
    return checks


def _host_checks(case: Case) -> list[Check]:
    looks = [
        ("versions", lambda: check_versions(case)),
        ("C library", check_library),
        ("memory", lambda: check_memory(case)),
        ("huge pages", check_huge_pages),
        ("descriptors", check_descriptors),
        ("locked memory", check_locked_memory),
        ("CPUs", lambda: check_cpus(case)),
        ("NUMA", check_numa),
        ("credentials", lambda: check_credentials(case)),
    ]
    if case.is_engine_host:
        looks.insert(1, ("plugin", check_plugin))
        looks.append(("/dev/shm", check_shared_memory))
    return [Check(_HOST, name, look) for name, look in looks]


def _seconds(text: str) -> float:
    return seconds(text, "Write for example 5.")
