# SPDX-License-Identifier: Apache-2.0
"""Options of the ``vllm-memory-node`` command."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from vllm_attn_offload import __version__
from vllm_attn_offload.cpu_list import parse_cpu_list
from vllm_attn_offload.memory_node.decode_attention import KERNELS
from vllm_attn_offload.transport.address import Address
from vllm_attn_offload.transport.trust import check_complete


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="vllm-memory-node",
        description="Own the paged KV cache of vLLM engines and run their decode "
        "attention.",
    )
    _add_listen_option(parser)
    parser.add_argument(
        "--device",
        type=_device,
        default="cpu",
        metavar="cpu|cuda:N",
        help="what holds the blocks and attends (default: %(default)s)",
    )
    parser.add_argument(
        "--attention-kernel",
        default="auto",
        choices=KERNELS,
        help="kernel that attends (default: %(default)s, the fastest that works here)",
    )
    parser.add_argument(
        "--kv-cache-gib",
        type=_positive,
        metavar="GIB",
        help="memory for KV blocks of all engines together (default: half of the "
        "memory that is available at start and that no other node of the host has "
        "promised; 90 %% of such memory of a GPU)",
    )
    parser.add_argument(
        "--preallocate",
        action="store_true",
        help="take the memory for KV blocks from the host at start, and lock it there "
        "where RLIMIT_MEMLOCK allows; without it a block takes memory when it is first "
        "written",
    )
    _add_trust_options(parser)
    _add_other_options(parser)
    options = parser.parse_args(argv)
    try:
        options.listen = options.listen or [_default_address()]
    except (OSError, ValueError) as error:
        parser.error(f"no place for the default socket, so use --listen: {error}")
    if options.preallocate and options.device != "cpu":
        parser.error(
            f"--preallocate was given with --device {options.device}. Allowed: it "
            "with --device cpu; GPU memory is taken whenever an engine joins. Leave "
            "it out."
        )
    if problem := _listen_problem(options) or _trust_problem(options):
        parser.error(problem)
    if options.metrics_port is not None:
        options.metrics_listen = Address("127.0.0.1", options.metrics_port)
    return options


def _add_listen_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        type=_address,
        action="append",
        default=[],
        metavar="HOST:PORT|unix:PATH",
        help="where engines connect; repeat it for several, such as TCP and the Unix "
        "socket through which workers of this host get shared memory (default: a Unix "
        "socket that only this user can open, in XDG_RUNTIME_DIR or in a directory of "
        "its own; port 0 picks a free one)",
    )
    parser.add_argument(
        "--name",
        type=_name,
        metavar="NAME",
        help="name in metrics and status (default: this host's name with the port or "
        "the socket)",
    )


def _default_address() -> Address:
    """Unix socket of this user, in a directory that no other user can write to.

    Raises:
        OSError: The directory cannot be made.
        ValueError: Its path is too long for a socket.
    """
    directory = os.environ.get("XDG_RUNTIME_DIR")
    if not directory:
        directory = f"{tempfile.gettempdir()}/vllm-memory-node-{os.geteuid()}"
        Path(directory).mkdir(mode=0o700, exist_ok=True)
    return Address.parse(f"unix:{directory}/vllm-memory-node.sock")


def _add_other_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpus",
        type=cpu_list,
        metavar="LIST",
        help="CPUs to run on, such as 4-7 or 0,2 (default: all that are allowed)",
    )
    parser.add_argument(
        "--metrics-listen",
        type=_address,
        metavar="HOST:PORT",
        help="serve /metrics for Prometheus, /healthz and /readyz here, and nothing "
        "else, to whoever asks",
    )
    parser.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="the same on this port of 127.0.0.1",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)


def _add_trust_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "trust",
        "Loopback addresses and Unix sockets need none of these. A token is asked for "
        "on all sockets, certificates on those of TCP.",
    )
    group.add_argument(
        "--auth-token-file",
        default="",
        metavar="PATH",
        help="file with the token that engines must know; it never travels",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="serve other hosts without a token",
    )
    for name, text in (
        ("cert", "certificate of this node (PEM), with its name or address"),
        ("key", "private key of the certificate (PEM)"),
        ("ca", "authority (PEM) that signed the certificates of node and engines"),
    ):
        group.add_argument(f"--tls-{name}", default="", metavar="PATH", help=text)


def _listen_problem(options: argparse.Namespace) -> str:
    listen: list[Address] = options.listen
    if twice := sorted({str(each) for each in listen if listen.count(each) > 1}):
        return (
            f"--listen {', '.join(twice)} was given more than once. Allowed: every "
            "address once. Leave the repetition out."
        )
    if options.metrics_listen is None:
        return ""
    if options.metrics_port is not None:
        return (
            "both --metrics-listen and --metrics-port were given. Allowed: one of "
            "them. Leave --metrics-port out."
        )
    if options.metrics_listen.path:
        return (
            f"--metrics-listen was given {options.metrics_listen}. Allowed: HOST:PORT "
            "or [IPV6]:PORT. Write for example 0.0.0.0:9600."
        )
    return ""


def _trust_problem(options: argparse.Namespace) -> str:
    try:
        check_complete(
            {
                "--tls-cert": options.tls_cert,
                "--tls-key": options.tls_key,
                "--tls-ca": options.tls_ca,
            }
        )
    except ValueError as error:
        return str(error)
    listen: list[Address] = options.listen
    if options.tls_cert and all(each.path for each in listen):
        return (
            f"TLS was asked for on {listen[0]}, which no other host reaches. "
            "Allowed: TLS on HOST:PORT. Leave the --tls options out."
        )
    if options.auth_token_file and options.insecure:
        return (
            "both --auth-token-file and --insecure were given. Allowed: one of them. "
            "Leave --insecure out."
        )
    remote = [each for each in listen if not each.is_local]
    if remote and not (options.auth_token_file or options.insecure):
        return (
            f"--listen {remote[0]} serves other hosts, and no token was given. "
            "Allowed: --auth-token-file PATH, or --insecure in a network that you "
            "trust. Make a token with: (umask 077; openssl rand -hex 32 > PATH)"
        )
    return ""


def cpu_list(text: str) -> frozenset[int]:
    """Read CPU numbers as ``taskset`` does: ``0-3,8``.

    Raises:
        argparse.ArgumentTypeError: Not such a list, or a CPU is not allowed here.
    """
    allowed = os.sched_getaffinity(0)
    try:
        cpus = frozenset(parse_cpu_list(text))
    except ValueError:
        cpus = frozenset()
    if not cpus or not cpus <= allowed:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of usable CPUs. Allowed here: "
            f"{','.join(map(str, sorted(allowed)))}. Write for example 0-1."
        )
    return cpus


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a device. Allowed: cpu and cuda:N. Write for example "
            "cuda:0."
        )
    return text


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _name(text: str) -> str:
    if not re.fullmatch(r"[ -~]{1,128}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name. Allowed: 1 to 128 printable ASCII characters. "
            "Write for example memory-node-0."
        )
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a port. Allowed: 0 to 65535; 0 picks a free one. Write "
            "for example 9600."
        )
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size. Allowed: a number above 0, in GiB."
        )
    return value
