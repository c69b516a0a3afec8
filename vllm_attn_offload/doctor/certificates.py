# SPDX-License-Identifier: Apache-2.0
"""The token and the certificates of this host, and the dates of certificates."""

from __future__ import annotations

import time
from collections.abc import Iterator

from vllm_attn_offload.doctor.case import Case
from vllm_attn_offload.doctor.finding import Finding

_SOON_S = 14 * 86400
_DAY_S = 86400
_RENEW = "Sign a new one and put it in the same place; it is read for every connection."


def check_credentials(case: Case) -> Iterator[Finding]:
    """Read the files as every connection does."""
    credentials = case.config.credentials
    try:
        token = credentials.read_token()
        context = credentials.compute_context()
    except ValueError as error:
        yield Finding.of_error("credentials", error, "readable files")
        return
    parts = ["a token"] if token else []
    parts += ["certificates"] if context else []
    yield Finding.ok("credentials", " and ".join(parts) or "none are given")
    if expires := credentials.expiry():
        yield expiry_finding("tls_cert", expires)
    if case.config.open_nodes:
        nodes = ", ".join(case.config.open_nodes)
        yield Finding.warn(
            "credentials",
            f"whoever reaches {nodes} may use the node: no token is given",
            "a token on both sides, or a network that you trust",
            "Start nodes with --auth-token-file and set auth_token_file to the same "
            "token.",
        )


def expiry_finding(whose: str, expires: float) -> Finding:
    """Compare a date with now.

    Args:
        whose: The certificate, in the user's words.
        expires: Unix time.
    """
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expires))
    left_s = expires - time.time()
    if left_s <= 0:
        return Finding.fail(
            "certificate", f"{whose} expired on {day}", "one that is valid now", _RENEW
        )
    if left_s < _SOON_S:
        return Finding.warn(
            "certificate",
            f"{whose} expires on {day}, in {left_s / _DAY_S:.1f} days",
            f"{_SOON_S // _DAY_S} days at least",
            _RENEW,
        )
    return Finding.ok("certificate", f"{whose} is valid until {day}")
