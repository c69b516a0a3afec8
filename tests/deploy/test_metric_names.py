# SPDX-License-Identifier: Apache-2.0
"""A node shows its metrics under the names that dashboard and alerts have for them."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from exported_labels import exported_labels
from harness.processes import free_port
from node_process import running_node

#: Prometheus 2.42, 3.0, and a browser.
ACCEPTED = {
    "prometheus-2": "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5",
    "prometheus-3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;"
    "q=0.6,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.1",
    "browser": "*/*",
}


@pytest.mark.parametrize("accepted", ACCEPTED.values(), ids=ACCEPTED)
def test_whoever_asks(accepted: str, tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    with running_node(tmp_path, "--metrics-listen", place, "--kv-cache-gib", "0.01"):
        reply = httpx.get(f"http://{place}/metrics", headers={"Accept": accepted})
    names = set(re.findall(r"^(\w[\w:]*)(?=[{ ])", reply.text, re.M))
    assert "attn_offload:memory_node_up" in names
    assert "process_open_fds" in names
    assert names <= exported_labels().keys()
