# SPDX-License-Identifier: Apache-2.0
"""ModelShape of a Hugging Face config.json, read by transformers' config classes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from vllm_attn_offload.planner.model.layers import layer_shapes
from vllm_attn_offload.planner.model.parameters import count_parameters, follows_rules
from vllm_attn_offload.planner.model.shape import ModelShape
from vllm_attn_offload.planner.model.states import recurrent_states

DTYPE_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "float8_e4m3fn": 8.0}
ENGINE_DTYPES = ("float32", "bfloat16", "float16")
# MXFP4 packs 32 4-bit values with one 8-bit scale.
QUANT_BITS = {"mxfp4": 4.25, "fp8": 8.0}
KV_DTYPE_BYTES = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "float32": 4.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
}


def find_config(model: str) -> Path:
    """The config.json of a file, a directory, or a Hugging Face model id.

    Raises:
        ValueError: Nothing there, and the hub has or gives no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        offline = not _resolves(constants.ENDPOINT)
        found = hf_hub_download(model, "config.json", local_files_only=offline)
        return Path(found)
    except ImportError as error:
        reason = str(error)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
    raise ValueError(
        f"No config.json for model {model!r} ({reason}). Allowed: a config.json, a "
        "model directory, or a Hugging Face model id. Check the name, or download the "
        "model's config.json and pass its path."
    )


def _resolves(url: str) -> bool:
    """True if the host of `url` has an address; the hub client would retry for 25 s."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlparse(url).hostname, 443)
    except OSError:
        return False
    return True


def read_configs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The text models' configurations with their classes' defaults filled in.

    Raises:
        ValueError: Not a model config, transformers missing, or unknown model type.
    """
    for path in paths:
        _check_names_a_type(path)
    return _read(paths)


def _read(paths: Sequence[Path], *options: str) -> list[dict[str, Any]]:
    script = str(Path(__file__).with_name("read_config.py"))
    child = subprocess.run(
        [sys.executable, script, *options, *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"transformers could not read {paths[0]}: {last}. It must be a valid "
            "config.json. Check the file, or update transformers."
        )
    replies = [json.loads(line) for line in child.stdout.splitlines()[-len(paths) :]]
    for path, reply in zip(paths, replies, strict=True):
        if "error" in reply:
            raise ValueError(_config_error(path, reply["error"], reply["detail"]))
    return [reply["config"] for reply in replies]


def _check_names_a_type(path: Path) -> None:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Cannot read {path}: {error}. It must be a Hugging Face config.json. "
            "Check the path."
        ) from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(
            f"{path} names no model_type. A Hugging Face config.json does. "
            "Pass the config.json of a causal language model."
        )


def _config_error(path: Path, kind: str, detail: str) -> str:
    if kind == "no-transformers":
        return (
            f"Reading {path} needs transformers, which is not importable ({detail}). "
            "Model shapes come only from its config classes. Run: pip install "
            "transformers"
        )
    if kind == "unknown-type":
        return (
            f"model_type {detail!r} in {path} is unknown to the installed "
            "transformers. Allowed are the types of its CONFIG_MAPPING. Update "
            "transformers, or use a supported model."
        )
    if kind == "no-class":
        return (
            f"The weights of {path} cannot be counted: transformers says: {detail}. "
            "Models of this family are counted in its causal language model. Update "
            "transformers, or use another model."
        )
    return (
        f"transformers rejected {path}: {detail}. The values must satisfy the model's "
        "config class. Correct the file."
    )


def read_model_shape(
    model: str,
    kv_dtype: str = "auto",
    weight_bits: float | None = None,
    dtype: str = "auto",
) -> ModelShape:
    """Shape of `model` (path, directory or hub id).

    Args:
        kv_dtype: One of KV_DTYPE_BYTES, or "auto": fp8 where the checkpoint asks for
            it, else like `dtype`.
        weight_bits: Bits per weight, instead of what the config says.
        dtype: Type of unquantized weights and of activations; "auto": the config's for
            weights, 16 bit for activations, as vLLM does.

    Raises:
        ValueError: Unreadable config, or layers the planner cannot describe.
    """
    if kv_dtype not in ("auto", *KV_DTYPE_BYTES):
        raise ValueError(
            f"kv_dtype={kv_dtype!r} is unknown. Allowed: auto, "
            f"{', '.join(KV_DTYPE_BYTES)}. Choose one of these."
        )
    path = find_config(model)
    (config,) = read_configs([path])
    name = path.parent.name if path.name == "config.json" else path.stem
    if not follows_rules(config):
        # They refuse within a second what they cannot describe.
        layer_shapes(config, name)
        recurrent_states(config, name, 2.0)
        (config,) = _read([path], "--count")
    if dtype != "auto":
        config |= {"dtype": dtype}
    element_bytes = 2.0 if dtype == "auto" else DTYPE_BITS[dtype] / 8
    if kv_dtype == "auto" and _stores_fp8(config):
        kv_dtype = "fp8"
    kv_bytes = KV_DTYPE_BYTES.get(kv_dtype, element_bytes)
    return shape_from_config(config, name, kv_bytes, weight_bits, element_bytes)


def _stores_fp8(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint asks for a KV cache of fp8, in ways that vLLM heeds."""
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method"))
    if method == "compressed-tensors":
        return quantization.get("kv_cache_scheme") is not None
    if not method.startswith("modelopt"):
        return False
    places = (quantization.get("quantization") or quantization, quantization)
    names = ("kv_cache_scheme", "kv_cache_quant_algo")
    asked = [place.get(name) for name in names for place in places]
    scheme = next(filter(None, asked), None)
    if isinstance(scheme, Mapping):
        kind = [scheme.get(name) for name in ("num_bits", "type", "dynamic")]
        return kind == [8, "float", False]
    return str(scheme).lower() == "fp8"


def shape_from_config(
    config: Mapping[str, Any],
    name: str,
    kv_element_bytes: float = 2.0,
    weight_bits: float | None = None,
    activation_bytes: float = 2.0,
) -> ModelShape:
    """Shape from an already defaulted configuration mapping.

    Raises:
        ValueError: A value is missing, or layers that the planner cannot describe.
    """
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    for key in needed:
        if not config.get(key):
            raise ValueError(
                f"The config of {name} has no {key}. The planner needs a decoder-only "
                "transformer. Use another model."
            )
    layers = layer_shapes(config, name)
    count = count_parameters(config, layers)
    linear_bits, expert_bits, base_bits = _weight_bits(config, name, weight_bits)
    return ModelShape(
        name=name,
        hidden_size=config["hidden_size"],
        layers=layers,
        dense_params=count.linear + count.lm_head,
        dense_bytes=(count.linear * linear_bits + count.lm_head * base_bits) / 8,
        lm_head_params=count.lm_head,
        lm_head_bytes=count.lm_head * base_bits / 8,
        expert_params=count.experts,
        expert_bytes=count.experts * expert_bits / 8,
        num_experts=count.num_experts,
        experts_per_token=count.experts_per_token,
        embedding_params=count.embedding,
        embedding_bytes=count.embedding * base_bits / 8,
        activation_bytes=activation_bytes,
        kv_element_bytes=kv_element_bytes,
        states=recurrent_states(config, name, activation_bytes),
    )


def _weight_bits(
    config: Mapping[str, Any], name: str, override: float | None
) -> tuple[float, float, float]:
    """Bits of linear, expert and embedding weights."""
    base = DTYPE_BITS.get(str(config.get("dtype")).removeprefix("torch."), 16.0)
    if override is not None:
        return override, override, base
    quantization = config.get("quantization_config")
    if not quantization:
        return base, base, base
    method = quantization.get("quant_method")
    bits = QUANT_BITS.get(method) or quantization.get("bits")
    if bits is None:
        raise ValueError(
            f"{name} is quantized by {method!r}, whose size the planner does not know. "
            f"Known: {', '.join(QUANT_BITS)}, or a config with 'bits'. "
            "Pass --weight-bits."
        )
    # MXFP4 checkpoints quantize only the experts.
    return (base if method == "mxfp4" else bits), bits, base
