# SPDX-License-Identifier: Apache-2.0
"""Credentials for memory nodes as options of commands, named as those of engines."""

from __future__ import annotations

import argparse

from vllm_attn_offload.transport.trust import (
    NO_CREDENTIALS,
    Credentials,
    check_complete,
)

_HELP = {
    "auth_token_file": "file with the token of the nodes' --auth-token-file",
    "tls_cert": "certificate (PEM) of this host",
    "tls_key": "private key (PEM) of --tls-cert",
    "tls_ca": "authority (PEM) that signed the certificates of host and nodes",
}


def add_trust_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("trust", "For memory nodes on other hosts.")
    for name, text in _HELP.items():
        group.add_argument(_option(name), default="", metavar="PATH", help=text)


def given_files(args: argparse.Namespace) -> dict[str, str]:
    """Return the engine's options of the same names, or none where none was given.

    Raises:
        ValueError: Only some of the TLS files were given.
    """
    given = {name: getattr(args, name) for name in _HELP}
    check_complete(
        {_option(name): given[name] for name in _HELP if name.startswith("tls_")}
    )
    return given if any(given.values()) else {}


def given_credentials(args: argparse.Namespace) -> Credentials:
    """Return what to show nodes, and to ask of them; files are read when connecting.

    Raises:
        ValueError: Only some of the TLS files were given.
    """
    files = given_files(args)
    if not files:
        return NO_CREDENTIALS
    return Credentials(
        files["auth_token_file"], files["tls_cert"], files["tls_key"], files["tls_ca"]
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
