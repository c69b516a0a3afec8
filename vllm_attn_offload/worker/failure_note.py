# SPDX-License-Identifier: Apache-2.0
"""The sentence with which a worker does not start, for the process that started it.

vLLM tells an executor only that some worker failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOTE_VARIABLE = "ATTN_OFFLOAD_FAILURE_NOTE"
_FILE_NAME = "attn-offload-failure"
_MAX_BYTES = 4096


class FailureNote:
    """A memory file that workers find by their environment; the first one writes.

    It has no name, so nothing is left of it.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create(_FILE_NAME)
        os.environ[NOTE_VARIABLE] = f"/proc/{os.getpid()}/fd/{self._fd}"

    def read(self) -> str:
        """Return what a worker wrote; empty: none did."""
        return os.pread(self._fd, _MAX_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Forget it; workers that look for it later find nothing."""
        os.close(self._fd)


@contextmanager
def noted_failure() -> Iterator[None]:
    """Leave the sentence of a ``ValueError`` to the process that started this one."""
    try:
        yield
    except ValueError as error:
        with suppress(OSError):  # nobody reads it, or no descriptor is left
            _write(str(error))
        raise


def _write(sentence: str) -> None:
    path = os.environ.get(NOTE_VARIABLE)
    if not path:
        return  # This is a worker of another executor.
    if not os.readlink(path).startswith(f"/memfd:{_FILE_NAME}"):
        return  # Ray hands the variable to other hosts, where the path is another file.
    fd = os.open(path, os.O_WRONLY)
    try:
        if not os.fstat(fd).st_size:
            os.pwrite(fd, sentence.encode()[:_MAX_BYTES], 0)
    finally:
        os.close(fd)
