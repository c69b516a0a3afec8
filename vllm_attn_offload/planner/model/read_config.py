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


def main(arguments: list[str]) -> int:
    """Print one {"config": ...} or {"error": kind, "detail": text} per path.

    After ``--count`` each config has "parameters", counted in the model's own class.
    """
    is_counting = arguments[0] == "--count"
    if not is_counting:
        sys.modules["torch"] = None  # type: ignore[assignment]
    for path in arguments[is_counting:]:
        print(json.dumps(read(path, is_counting), default=str))
    return 0


def read(path: str, is_counting: bool) -> dict[str, Any]:
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
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    values.setdefault("quantization_config", quantization)
    values["dtype"] = values.get("dtype") or raw.get("torch_dtype") or raw.get("dtype")
    if is_counting:
        try:
            values["parameters"] = count(text)
        except KeyError:
            return {"error": "no-class", "detail": f"no model for {text.model_type}"}
        except Exception as error:  # of hundreds of model classes, any
            return {"error": "no-class", "detail": " ".join(str(error).split())}
    return {"config": values}


def count(config: Any) -> dict[str, int]:
    """Parameters by use, of a model without memory.

    Raises:
        KeyError: transformers has no causal language model for the config.
        Exception: It has one, which does not take these values.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = model_class(config)
    lm_head = model.get_output_embeddings().weight
    tables = {
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is not lm_head
    }
    embedding = sum(table.numel() for table in tables)
    experts = sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name
    )
    total = sum(p.numel() for p in model.parameters())
    return {
        "linear": total - experts - lm_head.numel() - embedding,
        "experts": experts,
        "lm_head": lm_head.numel(),
        "embedding": embedding,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
