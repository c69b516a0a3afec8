# SPDX-License-Identifier: Apache-2.0
"""The date of a certificate, whether it is over or not."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from vllm_attn_offload.transport.certificate import certificate_expiry
from vllm_attn_offload.transport.trust import NO_CREDENTIALS, Credentials

_DAY_S = 86400.0


def sign(directory: Path, days: int, *key: str) -> tuple[str, str]:
    """A certificate that ends in so many days, and its key."""
    cert, key_file, request = (str(directory / name) for name in ("c.pem", "k", "csr"))
    new = ("-newkey", *(key or ("rsa:2048",)), "-nodes", "-keyout", key_file)
    _openssl("req", "-subj", "/CN=node", *new, "-out", request)
    (directory / "index.txt").write_text("")
    (directory / "serial").write_text("01\n")
    (directory / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\npolicy=p\n[p]\ncommonName=supplied\n"
        f"[d]\ndatabase={directory}/index.txt\nserial={directory}/serial\n"
        f"new_certs_dir={directory}\ndefault_md=sha256\n"
    )
    end = time.time() + days * _DAY_S
    stamps = (
        time.strftime("%Y%m%d%H%M%SZ", time.gmtime(each))
        for each in (end - 100 * _DAY_S, end)
    )
    begin, expires = stamps
    _openssl(
        *("ca", "-batch", "-selfsign", "-config", f"{directory}/ca.cnf"),
        *("-keyfile", key_file, "-in", request, "-out", cert, "-notext"),
        *("-startdate", begin, "-enddate", expires),
    )
    return cert, key_file


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("days", [30, -30])
def test_date(tmp_path: Path, days: int) -> None:
    expiry = certificate_expiry(*sign(tmp_path, days))
    assert abs(expiry - time.time() - days * _DAY_S) < 60


def test_renewed(tmp_path: Path) -> None:
    """The files are read again once they changed."""
    curve = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    files = sign(tmp_path, 10, *curve)
    first = certificate_expiry(*files)
    assert certificate_expiry(*files) == first
    assert sign(tmp_path, 20, *curve) == files
    assert abs(certificate_expiry(*files) - first - 10 * _DAY_S) < 60


def test_files_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once until one of them changes, and read again then."""
    cert, key = sign(tmp_path, 1)
    assert NO_CREDENTIALS.expiry() == 0
    assert Credentials(tls_cert=cert, tls_key=key).expiry() > time.time()
    Path(key).unlink()
    assert Credentials(tls_cert=cert, tls_key=key).expiry() == 0
    assert Credentials(tls_cert=cert, tls_key=key).expiry() == 0
    Path(key).write_text("no key")
    assert certificate_expiry(cert, key) == certificate_expiry(cert, key) == 0
    assert caplog.text.count("cannot tell when the certificate") == 2
    assert sign(tmp_path, 1) == (cert, key)
    assert certificate_expiry(cert, key) > time.time()
