# SPDX-License-Identifier: Apache-2.0
"""Child process: read config.json files through transformers, print JSON lines.

A process of its own, because transformers imports torch when it can (seconds), and
hiding torch from it must not leak into the caller.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Names that some families spell differently; transformers maps them on access.
CANONICAL = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
)


def main(paths: list[str]) -> int:
    """Print one {"config": ...} or {"error": kind, "detail": text} per path."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    for path in paths:
        print(json.dumps(read(path), default=str))
    return 0


def read(path: str) -> dict[str, Any]:
    """One file's values with the config class's defaults filled in."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        return {"error": "no-transformers", "detail": str(error)}
    with open(path, encoding="utf-8") as file:
        raw = json.load(file)
    if raw["model_type"] not in CONFIG_MAPPING:
        return {"error": "unknown-type", "detail": raw["model_type"]}
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw).get_text_config()
    except (TypeError, ValueError) as error:
        return {"error": "rejected", "detail": str(error)}
    values = config.to_dict()
    values |= {k: getattr(config, k) for k in CANONICAL if hasattr(config, k)}
    values.setdefault("quantization_config", raw.get("quantization_config"))
    values["dtype"] = values.get("dtype") or raw.get("torch_dtype") or raw.get("dtype")
    return {"config": values}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
