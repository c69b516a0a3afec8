# SPDX-License-Identifier: Apache-2.0
"""What nodes are told about an engine, whatever its model is called."""

from __future__ import annotations

from pathlib import Path

import msgspec
from harness import tiny_llama
from raw_session import make_geometry
from vllm.engine.arg_utils import EngineArgs

from vllm_attn_offload.engine.engine_identity import EngineIdentity
from vllm_attn_offload.protocol.messages import ReserveCapacity, Shard


def test_a_model_that_nodes_would_refuse(tmp_path: Path) -> None:
    tiny_llama.save(tmp_path)
    name = "org/mod\u00e8le\n\x1b[2J\u2028" + 300 * "x"
    options = tiny_llama.engine_options() | {"skip_tokenizer_init": True}
    config = EngineArgs(
        str(tmp_path), **options, served_model_name=[name, "other"]
    ).create_engine_config()
    request = EngineIdentity.of(config).request(Shard(), make_geometry(), 1)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ReserveCapacity)
    assert told.model == ("org/mod\u00e8le??[2J?" + 300 * "x")[:256]
