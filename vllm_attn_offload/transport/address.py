# SPDX-License-Identifier: Apache-2.0
"""Address of a memory node: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``."""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_FORMS = "HOST:PORT, [IPV6]:PORT or unix:PATH"
_UCRED = struct.Struct("@iII")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_UNIX_PATH_BYTES = 107  # sun_path of Linux, less its terminator


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP host and port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse an address as users write it.

        Raises:
            ValueError: ``text`` has none of the three forms.
        """
        if text.startswith("unix:"):
            return cls(path=_checked_path(text.removeprefix("unix:"), text))
        host, separator, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""  # an IPv6 address without brackets: where does its port begin?
        if not separator or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(
                f"{text!r} is not an address. Allowed: {_FORMS} with a port from 0 to "
                "65535. Write for example 127.0.0.1:7600 or unix:/tmp/node.sock."
            )
        if not _is_host(host):
            raise ValueError(
                f"{text!r} names no host. Allowed: an IP address, or a name whose "
                "parts between dots have 1 to 63 characters. Write for example "
                "127.0.0.1:7600."
            )
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True if only processes of this host can reach the address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def connect(self, timeout_s: float) -> socket.socket:
        """Open a connection to the address.

        Raises:
            OSError: Nobody listens there, or not within ``timeout_s`` seconds.
            PermissionError: Another user listens on the Unix socket, or could.
        """
        if self.path:
            check_directory(Path(self.path).parent)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(self.path)
                check_peer(sock)
            except OSError:
                sock.close()
                raise
            return sock
        sock = socket.create_connection((self.host, self.port), timeout_s)
        set_tcp_options(sock)
        return sock

    def listen(self, backlog: int = 128) -> socket.socket:
        """Bind and listen.

        Raises:
            OSError: The port or path is taken, or cannot be bound here.
            PermissionError: Another user could take the path.
        """
        if self.path:
            return self._listen_unix(backlog)
        family, _, _, _, endpoint = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(
            (str(endpoint[0]), int(endpoint[1])), family=family, backlog=backlog
        )

    def _listen_unix(self, backlog: int) -> socket.socket:
        check_directory(Path(self.path).parent)
        self._remove_stale_socket()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(self.path)
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(mask)
        return sock

    def _remove_stale_socket(self) -> None:
        """Unlink the socket file of a dead process; leave anything else alone."""
        if not Path(self.path).is_socket():
            return
        try:
            self.connect(timeout_s=1.0).close()
        except ConnectionRefusedError:
            Path(self.path).unlink(missing_ok=True)
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def check_directory(directory: Path) -> None:
    """Check that no other user can put a socket in place of one in a directory.

    Sticky directories such as /tmp pass: what lies there only its owner replaces.

    Raises:
        OSError: There is no such directory.
        PermissionError: It belongs to another user, or others may write to it.
    """
    status = directory.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (os.geteuid(), 0):
        problem = f"belongs to uid {status.st_uid}"
    elif mode & 0o022 and not mode & stat.S_ISVTX:
        problem = f"has mode {mode:04o}"
    else:
        return
    raise PermissionError(
        errno.EPERM,
        f"the directory {directory} of the socket {problem}. Allowed: one of uid "
        f"{os.geteuid()} or root that group and others cannot write to. Use another "
        f"one, or run: chmod go-w {directory}",
    )


@functools.cache
def host_id() -> str:
    """Return what two processes have in common on one host alone: its boot id.

    Empty where the kernel does not tell.
    """
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def set_tcp_options(sock: socket.socket) -> None:
    """Send at once, and notice a host that is gone without a word in half a minute.

    Unix sockets have no such options and are left as they are.
    """
    if sock.family == socket.AF_UNIX:
        return
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 4),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def peer_name(sock: socket.socket) -> str:
    """Return the host of a TCP socket's peer, or the user of a Unix socket's.

    Raises:
        OSError: The peer is gone.
    """
    if sock.family == socket.AF_UNIX:
        return f"uid {_peer_uid(sock)}"
    return str(sock.getpeername()[0])


def check_peer(sock: socket.socket) -> None:
    """Compare the user at the other end of a Unix socket; TCP sockets pass.

    Raises:
        PermissionError: It is neither this process's user nor root.
    """
    if sock.family != socket.AF_UNIX:
        return
    uid = _peer_uid(sock)
    if uid not in (os.geteuid(), 0):
        raise PermissionError(
            errno.EPERM,
            f"the process there runs as uid {uid}. Allowed: uid {os.geteuid()} and "
            "root. Run both as one user, or use TCP with a token",
        )


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return int(uid)


def _is_host(host: str) -> bool:
    """Whether a resolver takes it; what it does not is no OSError there."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return "\0" not in host


def _checked_path(path: str, text: str) -> str:
    if "\0" in path:
        raise ValueError(
            f"{text!r} has a socket path with a null character. Allowed: paths of "
            "files. Use another path, such as /tmp/node.sock."
        )
    num_bytes = len(os.fsencode(path))
    if not 0 < num_bytes <= _MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"{text!r} has a socket path of {num_bytes} bytes. Allowed: 1 to "
            f"{_MAX_UNIX_PATH_BYTES}. Use a shorter path, such as /tmp/node.sock."
        )
    return path
