# SPDX-License-Identifier: Apache-2.0
"""Child process: read config.json files through transformers, print JSON lines.

A process of its own, because transformers imports torch when it can (seconds), and
hiding torch from it must not leak into the caller.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Computed by some families' classes, and then not among the values they write.
COMPUTED = ("layer_types", "num_hidden_layers")


def main(paths: list[str]) -> int:
    """Print one {"config": ...} or {"error": kind, "detail": text} per path."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    for path in paths:
        print(json.dumps(read(path), default=str))
    return 0


def read(path: str) -> dict[str, Any]:
    """One file's values with the config class's defaults filled in."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import PretrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        return {"error": "no-transformers", "detail": str(error)}
    # Decodes infinities, which strict JSON cannot hold.
    raw, _ = PretrainedConfig.get_config_dict(path)
    if raw["model_type"] not in CONFIG_MAPPING:
        return {"error": "unknown-type", "detail": raw["model_type"]}
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        text = config.get_text_config()
        values = text.to_dict() | {
            key: value for key in COMPUTED if (value := getattr(text, key, None))
        }
    except (TypeError, ValueError, StrictDataclassError) as error:
        return {"error": "rejected", "detail": " ".join(str(error).split())}
    for canonical, own in text.attribute_map.items():
        if own in values:
            values[canonical] = values[own]
    # DeepSeek's class maps head_dim to this one, so that a given head_dim replaces it.
    if rope := raw.get("text_config", raw).get("qk_rope_head_dim"):
        values["qk_rope_head_dim"] = rope
    values["is_encoder_decoder"] = config.is_encoder_decoder
    values.setdefault("quantization_config", raw.get("quantization_config"))
    values["dtype"] = values.get("dtype") or raw.get("torch_dtype") or raw.get("dtype")
    return {"config": values}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
