# SPDX-License-Identifier: Apache-2.0
"""The image: a node runs as a user without rights on a root that it cannot write to.

The slow test builds the image itself, from a base that is made here: no registry is
asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from shutil import which

import pytest
import torch
from harness.processes import free_port
from helm_chart import DEPLOY
from node_process import NodeProcess
from paged_batch import PagedBatch
from raw_session import RawSession, make_geometry
from wheel_environment import install_wheel

from vllm_attn_offload.transport.trust import Credentials

UID = 65532
TOKEN = b"0123456789abcdef0123456789abcdef"
NUM_BLOCKS, MAX_INSTALLED_MB = 16, 130
BUILDERS = ("buildah", "mmdebstrap")
#: Debian's release whose Python the wheel runs on; the base is made of it.
RELEASE = "bookworm"
AS_USER = (
    *("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
)
#: A kubelet hands the token to the pod's fsGroup with this mode and owner.
HANDED = f"install -D -m 440 -o root -g {UID}"
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "sh", "-ec")
#: This host's root; what is /proc, /sys and /dev stays, as in containers.
HOST_ROOT = f"""
mount -t tmpfs -o mode=755 tmpfs /media
mkdir /media/node
mount --bind "$0" /media/node
{HANDED} "$1" /media/auth/token
for place in $(findmnt --raw --noheadings --output TARGET); do
    case $place in
    /proc* | /sys* | /dev*) ;;
    *) mount -o remount,ro,bind "$place" || : ;;
    esac
done
shift
exec "$@"
"""
#: The root of an image.
IMAGE_ROOT = f"""
{HANDED} "$1" "$0/media/auth/token"
mount --bind "$0" "$0"
mount -o remount,ro,bind "$0"
mount -t proc proc "$0/proc"
root=$0
shift
exec chroot "$root" "$@"
"""
WRITE = """
for place in / /tmp /var/tmp /media; do
    touch $place/x 2>/dev/null && exit 1
done
exit 0
"""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(which, ("unshare", "setpriv", "findmnt"))),
    reason="needs root, and util-linux, for mounts of its own",
)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    (tmp_path / "token").write_bytes(TOKEN)
    return tmp_path / "token"


def public_python() -> str:
    """A Python that other users may run, such as Debian's."""
    folders, versions = ("/usr/bin", "/usr/local/bin"), ("3.11", "3.12")
    names = [f"{folder}/python{version}" for folder in folders for version in versions]
    for name in map(os.path.realpath, (sys.executable, *names)):
        check = [*AS_USER, name, "-c", "import ensurepip, venv"]
        if subprocess.run(check, capture_output=True).returncode == 0:
            return name
    pytest.skip("needs a Python 3.11 or 3.12 that other users may run")


def check_serves(
    prefix: tuple[str | Path, ...], command: tuple[str, ...], log: Path
) -> None:
    """Start a node behind ``prefix``, which cannot write, and attend for two steps."""
    subprocess.run([*prefix, *AS_USER, "sh", "-c", WRITE], check=True)
    geometry = make_geometry()
    batch = PagedBatch(geometry, NUM_BLOCKS, 2)
    node = NodeProcess(
        f"127.0.0.1:{free_port()}",
        log,
        *("--kv-cache-gib", "0.1", "--auth-token-file", "/media/auth/token"),
        prefix=tuple(map(str, (*prefix, *AS_USER))),
        command=command,
    )
    try:
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        assert f"Uid:\t{UID}\t{UID}" in status
        assert "CapEff:\t0000000000000000" in status
        credentials = Credentials(token=TOKEN)
        with closing(
            RawSession(node.address, geometry, NUM_BLOCKS, credentials)
        ) as session:
            for num_new in ([20, 5], [1, 1]):
                step, qkv = batch.grow(num_new)
                session.send_step(step)
                (out,) = session.attend(1, qkv)[:1]
                exact, _ = batch.expected(torch.float64)
                torch.testing.assert_close(out.double(), exact, atol=4e-6, rtol=1e-6)
    finally:
        node.kill()


@needs_root
def test_wheel_on_a_read_only_root(dist: Path, token: Path, tmp_path: Path) -> None:
    """What the image installs, with this host's files in place of the base's."""
    environment = tmp_path / "environment"
    install_wheel(environment, dist, public_python())
    check_serves(
        (*OWN_MOUNTS, HOST_ROOT, environment, token),
        ("/media/node/bin/python", "/media/node/bin/vllm-memory-node"),
        tmp_path / "node.log",
    )


class Builder:
    """``buildah`` with images of its own.

    Args:
        directory: For all that it keeps.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(self, *arguments: str | Path) -> str:
        """Run a command; returns its output without the line's end."""
        places = (f"--root={self._directory}/store", f"--runroot={self._directory}/run")
        ran = subprocess.run(
            ["buildah", *places, "--storage-driver=vfs", *arguments],
            env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
        return ran.stdout.strip()

    def make_base(self) -> str:
        """Make an image of Debian with its Python; returns its name."""
        archive = self._directory / "base.tar"
        packages = "--include=python3,python3-venv"
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", packages, RELEASE, archive],
            check=True,
            timeout=300,
        )
        container = self.run("from", "scratch")
        self.run("add", "--quiet", container, archive, "/")
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.run("config", "--env", path, container)
        self.run("commit", "--quiet", "--rm", container, "localhost/base")
        return "localhost/base"

    def build_node(self, context: Path, base: str) -> Path:
        """Build the image of a node without a network; returns its mounted root."""
        settings = self._directory / "pip.conf"
        settings.write_text("[global]\nno-index = true\nfind-links = /tmp\n")
        self.run(
            *("build", "--format=docker", f"--build-arg=BASE={base}"),
            f"--volume={settings}:/etc/pip.conf:ro",
            *("--file", DEPLOY / "container" / "Dockerfile", "--tag", "localhost/node"),
            context,
        )
        return Path(self.run("mount", self.run("from", "localhost/node")))


def download_wheels(dist: Path, directory: Path) -> None:
    """Put our wheel, and those that it requires on RELEASE, into a directory."""
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "download", "--quiet"]
    options = ("--only-binary=:all:", "--python-version=3.11", f"--dest={directory}")
    subprocess.run([*pip, *options, wheel], check=True, timeout=300)


@needs_root
@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(which, BUILDERS)), reason=f"needs {' and '.join(BUILDERS)}"
)
def test_image(
    dist: Path, token: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built from a base of Debian's packages, and from wheels that lie beside ours."""
    context, kept = tmp_path / "context", tmp_path / "buildah"
    kept.mkdir()
    builder = Builder(kept)
    base = builder.make_base()
    download_wheels(dist, context)
    root = builder.build_node(context, base)
    try:
        shown = json.loads(builder.run("inspect", "--type=image", "localhost/node"))
        assert shown["Docker"]["config"]["User"] == f"{UID}:{UID}"
        files = [path for path in (root / "opt").rglob("*") if path.is_file()]
        installed = sum(path.lstat().st_size for path in files) / 1e6
        with capsys.disabled():
            print(f"\nimage: {installed:.0f} MB over its base")  # noqa: T201
        assert installed < MAX_INSTALLED_MB
        program = "/opt/vllm-memory-node/bin/vllm-memory-node"
        prefix = (*OWN_MOUNTS, IMAGE_ROOT, root, token)
        check_serves(prefix, (program,), tmp_path / "node.log")
    finally:
        builder.run("umount", "--all")
