# SPDX-License-Identifier: Apache-2.0
"""Until when a certificate is valid."""

from __future__ import annotations

import errno
import functools
import logging
import os
import ssl

# Not by `get_logger`, which imports vLLM.
logger = logging.getLogger(f"vllm.{__name__}")

#: OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name.
_NO_CHECK_TIME = 0x200000
#: The process or the host has no room for a moment.
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def certificate_expiry(cert: str, key: str) -> float:
    """Return the Unix time at which a certificate expires, which may be over.

    The result is kept until one of the files changes.

    Args:
        cert: File with the certificate (PEM).
        key: File with its private key (PEM), without a password.

    Returns:
        0 where it cannot be read, which is logged once until one of the files changes.
    """
    try:
        return _expiry(cert, key, _stamp(cert), _stamp(key))
    except OSError:
        return 0.0


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    # Rights count, too: they may be why it could not be read.
    return status.st_ctime_ns, status.st_ino


@functools.lru_cache(maxsize=4)
def _expiry(cert: str, key: str, *stamps: tuple[int, int] | None) -> float:
    try:
        return _read_expiry(cert, key)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _SHORT:
            raise  # It may be read the next time.
        logger.warning(
            "cannot tell when the certificate %r with the key %r expires: %s",
            cert,
            key,
            error,
        )
        return 0.0


def _read_expiry(cert: str, key: str) -> float:
    # The ssl module shows the dates of a peer's certificate alone, so one side of a
    # handshake in memory shows it to the other, which trusts that one at any time.
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key, password="")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server)
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    shown = theirs.getpeercert() or {}
    expires = shown.get("notAfter")
    if not isinstance(expires, str):
        raise ValueError(
            f"the certificate {cert!r} does not say when it expires. Allowed: one with "
            "a last day. Sign it again, with openssl x509 -days."
        )
    return float(ssl.cert_time_to_seconds(expires))
