# SPDX-License-Identifier: Apache-2.0
"""Certificates of an authority that is made for a test run."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Identity:
    """A certificate, its key, and the authority that signed it."""

    cert: str
    key: str
    ca: str

    @property
    def options(self) -> tuple[str, ...]:
        """Of ``vllm-memory-node``."""
        return (
            *("--tls-cert", self.cert),
            *("--tls-key", self.key),
            *("--tls-ca", self.ca),
        )


class Authority:
    """Signs certificates with the ``openssl`` command.

    Args:
        directory: Where its files go.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cert = directory / "ca.pem"
        self._key = directory / "ca.key"
        _openssl(
            *("req", "-x509", "-subj", "/CN=authority", "-days", "1"),
            *("-keyout", self._key, "-out", self._cert),
            *_NEW_KEY,
        )

    def sign(self, name: str, host: str, days: int = 1) -> Identity:
        """A certificate for a host: ``IP:127.0.0.1`` or ``DNS:localhost``.

        It is valid for some days; a negative number has expired.
        """
        cert, key, request, extensions = (
            self._directory / f"{name}.{suffix}"
            for suffix in ("pem", "key", "csr", "ext")
        )
        extensions.write_text(f"subjectAltName={host}\n")
        _openssl(
            *("req", "-subj", f"/CN={name}", "-keyout", key, "-out", request),
            *_NEW_KEY,
        )
        _openssl(
            *("x509", "-req", "-in", request, "-out", cert, "-days", str(days)),
            *("-CA", self._cert, "-CAkey", self._key, "-CAcreateserial"),
            *("-extfile", extensions),
        )
        return Identity(str(cert), str(key), str(self._cert))


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
