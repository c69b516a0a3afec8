# SPDX-License-Identifier: Apache-2.0
"""Until when a certificate is valid."""

from __future__ import annotations

import functools
import os
import ssl

#: OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name.
_NO_CHECK_TIME = 0x200000


def certificate_expiry(cert: str, key: str) -> float:
    """Return the Unix time at which a certificate expires, which may be over.

    The result is kept until one of the files changes.

    Args:
        cert: File with the certificate (PEM).
        key: File with its private key (PEM), without a password.

    Raises:
        OSError: A file is missing, or the two do not belong together.
        ValueError: The certificate has no such date.
    """
    stamps = tuple(
        (status.st_mtime_ns, status.st_size, status.st_ino)
        for status in (os.stat(cert), os.stat(key))
    )
    return _expiry(cert, key, stamps)


@functools.lru_cache(maxsize=4)
def _expiry(cert: str, key: str, stamps: tuple[tuple[int, int, int], ...]) -> float:
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
