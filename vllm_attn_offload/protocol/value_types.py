# SPDX-License-Identifier: Apache-2.0
"""Values in messages, bounded: what comes from the wire is checked by its type."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

NONCE_BYTES = 32
MAX_MODEL_CHARS = 256

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Bytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
Total = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
# Names reach logs and metrics: printable ASCII, so that none of them forges a line.
Token = Annotated[
    str, msgspec.Meta(min_length=1, max_length=128, pattern=r"\A[ -~]+\Z")
]
# In any script, but likewise without what ends a line or moves a cursor; short, because
# one answer tells the models of all sessions.
ModelName = Annotated[
    str,
    msgspec.Meta(
        max_length=MAX_MODEL_CHARS,
        pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z",
    ),
]
# Not for logs and metrics, unless a node says it of itself.
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
#: What carries a session's frames; "" before a worker attaches.
TransportName = Literal["", "shared memory", "device memory", "unix", "tcp", "tls"]
#: By the name that users are shown.
TRANSPORT_NAMES: dict[str, TransportName] = {
    "": "",
    "shared memory": "shared memory",
    "device memory": "device memory",
    "Unix socket": "unix",
    "TCP": "tcp",
    "TLS": "tls",
}
