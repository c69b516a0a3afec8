# SPDX-License-Identifier: Apache-2.0
"""A stream socket whose receives spin for a while and then block, in the C library."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import threading

from vllm_attn_offload.native.waits import (
    CLOSED,
    FAILED,
    INTERRUPTED,
    READY,
    NativeWaits,
    Receive,
    milliseconds,
)
from vllm_attn_offload.transport.streams import PART_RECEIVED, BlockingStream


class NativeStream(BlockingStream):
    """Receives a whole buffer in one C call, without the GIL.

    Args:
        sock: Connected stream socket, not TLS; owned from here on.
        stall_timeout_s: Longest pause of the peer once bytes move, in seconds.
        waits: The C library.
        spin_us: Longest spin before a receive blocks.
    """

    def __init__(
        self,
        sock: socket.socket,
        stall_timeout_s: float,
        waits: NativeWaits,
        spin_us: int,
    ) -> None:
        super().__init__(sock, stall_timeout_s)
        self._receive = waits.receive
        self._spin_ns = spin_us * 1000
        # The last two views: a header, always in one place, and a payload.
        self._newer = self._older = self._new_call(memoryview(bytearray(1)))
        # As in SharedMemoryTransport: the descriptor stays open for a thread in C.
        self._is_closed = self._is_receiving = False
        self._release_lock = threading.Lock()

    def receive_into(self, view: memoryview, timeout_s: float | None) -> None:
        if not view.nbytes:
            return
        call = self._older
        self._older = self._newer
        if view is not call.view:
            call = self._older if view is self._older.view else self._new_call(view)
        self._newer = call
        self._is_receiving = True
        try:
            if self._is_closed:
                raise ConnectionResetError("the connection was closed")
            status = INTERRUPTED
            while status == INTERRUPTED and not self._is_closed:
                # Signal handlers have run here, and one may have closed this.
                status = self._receive(call.reference, milliseconds(timeout_s))
        finally:
            self._is_receiving = False
            if self._is_closed:
                self._release()
        if status != READY:
            raise self._failure(status, call, timeout_s)

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._release()

    def _release(self) -> None:
        if not self._is_receiving:
            with self._release_lock:
                self._sock.close()

    def _new_call(self, view: memoryview) -> _Call:
        return _Call(
            view,
            spin_ns=self._spin_ns,
            socket=self._sock.fileno(),
            stall_ms=milliseconds(self._stall_timeout_s),
        )

    def _failure(self, status: int, call: _Call, timeout_s: float | None) -> OSError:
        if status in (CLOSED, INTERRUPTED):
            return ConnectionResetError("the peer closed the connection")
        if status == FAILED:
            return OSError(call.progress.error, "receiving from the peer failed")
        if call.progress.error == errno.ETIMEDOUT:
            return TimeoutError(PART_RECEIVED)
        if call.progress.received or timeout_s is None:
            timeout_s = self._stall_timeout_s
        return TimeoutError(f"nothing received for {timeout_s:.1f} s")


class _Call:
    """A view and what C needs to fill it; kept, because making one costs as much."""

    def __init__(self, view: memoryview, **fields: int) -> None:
        self.view = view
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self.progress = Receive(data=address, num_bytes=view.nbytes, **fields)
        self.reference = ctypes.byref(self.progress)
