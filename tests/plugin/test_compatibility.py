# SPDX-License-Identifier: Apache-2.0
"""What is refused: when the engine is configured, with three parts in a message."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Gemma3Config
from vllm import ModelRegistry
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm_attn_offload.patches import apply_patches

from vllm_attn_offload import LLM
from vllm_attn_offload.attention.impl import AttentionOffloadImpl
from vllm_attn_offload.compatibility import UNSUPPORTED, check_layers, check_supported
from vllm_attn_offload.engine.args import CPU_WORKER_CLS, SCHEDULER_CLS
from vllm_attn_offload.engine.executor_choice import EXECUTOR_CLS
from vllm_attn_offload.engine.scheduler import AttentionOffloadScheduler

OFFLOAD: dict[str, Any] = {"attention_offload": {}}
ATTENTION_OP = "vllm::unified_attention_with_output"
Refused = Callable[..., str]
ModelDir = Callable[..., str]

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_patches()
    # Restored afterwards: configuring an engine writes them.
    monkeypatch.setenv("ATTN_OFFLOAD_RUN_DIR", "unused")
    monkeypatch.setenv("ATTN_OFFLOAD_DATA_PARALLEL_SIZE", "1")


@pytest.fixture
def model_dir(smollm2: str, tmp_path: Path) -> ModelDir:
    """SmolLM2's configuration with changes, or another architecture's, on disk."""

    def make(**config: Any) -> str:
        if "architectures" not in config:
            config = json.loads(Path(smollm2, "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def create(model: str, **arguments: Any) -> VllmConfig:
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        additional_config=OFFLOAD,
        **arguments,
    ).create_engine_config()


def refusal(model: str, **arguments: Any) -> str:
    """The message of the refusal, of which every line has three parts."""
    before = child_processes()
    with pytest.raises(ValueError, match="Attention offloading") as error:
        create(model, **arguments)
    assert error.type is ValueError
    message = str(error.value)
    for line in message.splitlines():
        assert re.fullmatch(
            r"Attention offloading does not support .+\. Allowed: .+\. .+\.", line
        )
    assert child_processes() <= before
    return message


def child_processes() -> set[psutil.Process]:
    """Processes below this one; other tests' memory nodes may be among them."""
    return set(psutil.Process().children(recursive=True))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"runner": "pooling"}, "runner='pooling'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2'"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype='int8_per_"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype='fp8_per_"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype='nvfp4'"),
        ({"kv_cache_dtype": "turboquant_k8v4"}, "kv_cache_dtype='turboquant_k8v4'"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "kv_cache_dtype_skip_layers=['0']",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        (
            {"tensor_parallel_size": 9, "decode_context_parallel_size": 3},
            "decode_context_parallel_size=3",
        ),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size=2 with nnodes=2"),
        (
            {"data_parallel_size": 2, "data_parallel_backend": "ray"},
            "data_parallel_backend=ray",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "a KV connector (kv_transfer_config)",
        ),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"enable_elastic_ep": True}, "enable_elastic_ep"),
        ({"enable_fault_tolerance": True}, "enable_fault_tolerance"),
        (
            {
                "ec_transfer_config": {
                    "ec_connector": "ECExampleConnector",
                    "ec_role": "ec_both",
                }
            },
            "an encoder-cache connector (ec_transfer_config)",
        ),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}},
            "backend_per_kind",
        ),
        (
            {"compilation_config": {"pass_config": {"fuse_attn_quant": True}}},
            "the compilation pass fuse_attn_quant",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_arguments(smollm2: str, arguments: dict[str, Any], given: str) -> None:
    assert f"does not support {given}" in refusal(smollm2, **arguments)


def test_refused_mixed_dtypes(smollm2: str) -> None:
    """By vLLM itself, in words of its own, from 0.33 on."""
    refused = (
        "does not support kv_cache_dtype='bfloat16' with dtype='float32'"
        '|kv_cache_dtype="bfloat16" is incompatible with dtype="float32"'
    )
    with pytest.raises(ValueError, match=refused):
        create(smollm2, kv_cache_dtype="bfloat16", dtype="float32")


def test_refused_batch_invariance(
    smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT=1" in refusal(smollm2)


@pytest.mark.parametrize(
    ("mode", "splitting_ops", "given"),
    [
        ("FULL", None, "cudagraph_mode=FULL"),
        ("PIECEWISE", ["vllm::mamba_mixer"], "splitting_ops without vllm::unified_"),
        ("FULL_AND_PIECEWISE", ["vllm::mamba_mixer"], "splitting_ops without vllm::"),
        ("PIECEWISE", [ATTENTION_OP], ""),
        ("FULL_DECODE_ONLY", ["vllm::mamba_mixer"], ""),
        ("NONE", [], ""),
    ],
)
def test_refused_graphs(
    smollm2: str, mode: str, splitting_ops: list[str] | None, given: str
) -> None:
    """Set on a finished configuration: vLLM has no graphs on CPU and drops them."""
    config = create(smollm2)
    config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    config.compilation_config.splitting_ops = splitting_ops
    if not given:
        check_supported(config)
        return
    with pytest.raises(ValueError, match=f"does not support {given}"):
        check_supported(config)


def test_breakable_graphs(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = create(smollm2)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    check_supported(config)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder models"),
        ({"head_dim": 20}, "heads of size 20. Allowed: head sizes that are multiples"),
        ({"head_dim": 584}, "heads of size 584"),
        ({"v_head_dim": 32}, "values of size 32 with keys of size 64"),
    ],
)
def test_refused_model_configs(
    model_dir: ModelDir, changes: dict[str, Any], given: str
) -> None:
    assert f"does not support {given}" in refusal(model_dir(**changes))


@pytest.mark.parametrize(
    ("module", "architecture", "config", "given"),
    [
        (
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            {
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
            },
            "multi-head latent attention (MLA)",
        ),
        ("mamba", "MambaForCausalLM", {"state_size": 16}, "attention-free models"),
    ],
)
def test_refused_architectures(
    model_dir: ModelDir,
    module: str,
    architecture: str,
    config: dict[str, Any],
    given: str,
) -> None:
    load_class(module, architecture)
    model = model_dir(architectures=[architecture], model_type=module, **TINY, **config)
    assert f"does not support {given}" in refusal(model)


def load_class(module: str, architecture: str) -> None:
    """As vLLM looks at classes in a process that takes many seconds otherwise."""
    loaded = importlib.import_module(f"vllm.model_executor.models.{module}")
    ModelRegistry.register_model(architecture, getattr(loaded, architecture))


NGRAM = {"method": "ngram", "num_speculative_tokens": 15, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("speculation", "given"),
    [
        (NGRAM, ""),
        ({"method": "draft_model", "num_speculative_tokens": 3}, ""),
        (NGRAM | {"num_speculative_tokens": 16}, "num_speculative_tokens=16. Allowed"),
        (
            {"method": "draft_model", "num_speculative_tokens": 3}
            | {"parallel_drafting": True},
            "parallel_drafting. Allowed: drafts made one after another. Drop",
        ),
        (NGRAM | {"method": "ngram_gpu"}, "speculative decoding by ngram_gpu"),
        (
            {"method": "custom_class", "model": "a.B", "num_speculative_tokens": 3},
            "speculative decoding by custom_class",
        ),
        (
            {"method": "extract_hidden_states", "num_speculative_tokens": 1},
            "speculative decoding by extract_hidden_states",
        ),
        (
            {"method": "draft_model", "num_speculative_tokens": 3}
            | {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "fp8"},
            "TRITON_ATTN and kv_cache_dtype=fp8 in a draft model",
        ),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else "",
)
def test_speculation(smollm2: str, speculation: dict[str, Any], given: str) -> None:
    """Drafts of the target itself, where a method needs a model."""
    is_drafted = speculation["method"] == "draft_model"
    options = speculation | ({"model": smollm2} if is_drafted else {})
    if not given:
        create(smollm2, speculative_config=options)
        return
    assert given in refusal(smollm2, speculative_config=options)


def test_refused_drafts(smollm2: str) -> None:
    """Set on a finished configuration: vLLM has them for other models."""
    config = create(smollm2, speculative_config=NGRAM)
    speculation = config.speculative_config
    assert speculation is not None
    # What suffix decoding takes by default; its package is not needed to refuse it.
    speculation.method = "suffix"
    speculation.num_speculative_tokens = speculation.suffix_decoding_max_tree_depth
    message = "num_speculative_tokens=24. Allowed: num_speculative_tokens up to 15. Set"
    with pytest.raises(ValueError, match=message):
        check_supported(config)
    speculation.num_speculative_tokens = 15
    check_supported(config)
    for method in ("dflash", "dspark", "medusa", "mlp_speculator"):
        speculation.method = method
        with pytest.raises(ValueError, match=f"decoding by {method}. Allowed: the me"):
            check_supported(config)
    speculation.method = "mtp"
    check_supported(config)
    speculation.draft_model_config = copy.deepcopy(speculation.draft_model_config)
    speculation.draft_model_config.hf_config.model_type = "gemma4_mtp"
    with pytest.raises(ValueError, match="decoding by gemma4_mtp. Allowed: the meth"):
        check_supported(config)
    speculation.method = "ngram"
    check_supported(config)
    speculation.enable_adaptive_verification = True
    with pytest.raises(ValueError, match="does not support enable_adaptive_verif"):
        check_supported(config)


@pytest.mark.parametrize(
    ("offload", "arguments", "given"),
    [
        (
            {},
            {"speculative_config": NGRAM},
            "speculative decoding with recurrent states",
        ),
        ({"num_microbatches": 2}, {}, "num_microbatches=2 for a hybrid model"),
        ({}, {"prefix_match_unit": 16}, "prefix_match_unit=16 for a hybrid model"),
        ({"num_microbatches": "auto"}, {}, ""),
    ],
)
def test_options_of_hybrid_models(
    model_dir: ModelDir, offload: dict[str, Any], arguments: dict[str, Any], given: str
) -> None:
    name = "JambaForCausalLM"
    load_class("jamba", name)
    engine_args = EngineArgs(
        model=model_dir(architectures=[name], model_type="jamba", **TINY),
        skip_tokenizer_init=True,
        additional_config={"attention_offload": offload},
        **arguments,
    )
    if not given:
        assert engine_args.create_engine_config().model_config.is_hybrid
        return
    with pytest.raises(ValueError, match=f"does not support {given}. Allowed: "):
        engine_args.create_engine_config()


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 128},
        # Longer than the longest context, and a context below the window.
        {"sliding_window": 1 << 18},
        {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 2},
        {"attn_logit_softcapping": 50.0},
        {"attention_chunk_size": 64},
        {"num_key_value_heads_per_layer": [3, 1]},
        {"add_swa_attention_sink_bias": True},
        {"num_kv_shared_layers": 2},
    ],
)
def test_accepted_model_configs(model_dir: ModelDir, changes: dict[str, Any]) -> None:
    """Layers say how they attend; `test_families` attends with them."""
    create(model_dir(**changes))


@pytest.mark.parametrize(
    "quantisation",
    [
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        },
        {
            "quant_method": "modelopt",
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        },
    ],
    ids=["compressed-tensors", "modelopt"],
)
def test_checkpoint_with_fp8_kv_cache(
    model_dir: ModelDir, quantisation: dict[str, Any]
) -> None:
    """Taken as it is, and with the model's own dtype."""
    model = model_dir(quantization_config=quantisation)
    create(model, dtype="bfloat16")
    create(model, dtype="bfloat16", kv_cache_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e4m3"])
def test_fp8_kv_cache(smollm2: str, dtype: str, kv_dtype: str) -> None:
    config = create(smollm2, dtype=dtype, kv_cache_dtype=kv_dtype)
    assert config.cache_config.cache_dtype == kv_dtype


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"strategy": "attn_head"}, "KV cache of 8 bits of type float by attn_head"),
        ({"type": "int"}, "KV cache of 8 bits of type int by tensor"),
        ({"num_bits": 4}, "KV cache of 4 bits of type float by tensor"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_checkpoint_with_another_kv_cache(
    model_dir: ModelDir, changes: dict[str, Any], given: str, place: str
) -> None:
    """Refused from the configuration, with advice that works."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"} | changes
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    model = model_dir(**{place: quantisation})
    message = refusal(model, dtype="bfloat16")
    assert given in message
    assert "--kv-cache-dtype bfloat16" in message
    create(model, dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_scheme_of_a_text_config_is_found(smollm2: str) -> None:
    config = create(smollm2, dtype="bfloat16")
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head"}
    config.model_config.hf_config = Gemma3Config(
        text_config={"quantization_config": {"kv_cache_scheme": scheme}}
    )
    with pytest.raises(ValueError, match="8 bits of type float by attn_head"):
        check_supported(config)


def test_every_problem_is_named(model_dir: ModelDir) -> None:
    message = refusal(model_dir(v_head_dim=32), kv_cache_dtype="fp8_e5m2")
    assert len(message.splitlines()) == 2


def test_refused_worker(smollm2: str) -> None:
    """What the user chose is never replaced silently; nor executors (tests/hosts)."""
    theirs = "vllm.v1.worker.cpu_worker.CPUWorker"
    message = f"worker_cls={theirs!r} was given together with attention offloading, wh"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        create(smollm2, worker_cls=theirs)
    assert str(error.value).endswith(f"needs {CPU_WORKER_CLS}. Drop one of the two.")


def test_llm_refuses_before_any_process(smollm2: str) -> None:
    before = child_processes()
    with pytest.raises(ValueError, match="not support kv_cache_dtype='fp8_e5m2'"):
        LLM(smollm2, attention_offload=True, kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ValueError, match="no option kv_cache_gb. Did you mean kv"):
        LLM(smollm2, attention_offload_config={"kv_cache_gb": 1})
    assert child_processes() <= before


@pytest.mark.parametrize("backend", [None, "mp", "uni", EXECUTOR_CLS])
def test_supported_engine(smollm2: str, backend: str | None) -> None:
    config = create(smollm2, distributed_executor_backend=backend, dtype="bfloat16")
    assert config.parallel_config.distributed_executor_backend == EXECUTOR_CLS
    assert config.parallel_config.worker_cls == CPU_WORKER_CLS
    # Hashed into the key of the compile cache: nothing that changes per run.
    assert config.additional_config == OFFLOAD
    assert config.compute_hash() == create(smollm2, dtype="bfloat16").compute_hash()


def test_scheduler(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery needs its scheduler; without recovery it is vLLM's."""
    config = create(smollm2)
    assert config.scheduler_config.scheduler_cls == SCHEDULER_CLS
    assert config.scheduler_config.get_scheduler_cls() is AttentionOffloadScheduler
    with pytest.raises(ValueError, match="'x.Y' was given together .* on_node_loss"):
        create(smollm2, scheduler_cls="x.Y")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "120")
    with pytest.raises(ValueError, match="recovery_timeout_s=120 was given. Allowed"):
        create(smollm2)
    monkeypatch.setitem(OFFLOAD, "attention_offload", {"on_node_loss": "fail"})
    assert create(smollm2).scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("extra", "given"),
    [
        ({"chunk_lookback": 1}, "chunk_lookback"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    ],
)
def test_refused_layers(extra: dict[str, Any], given: str) -> None:
    """What no configuration shows is refused when the layer is built."""
    message = f"does not support {given}. Allowed: .*Run this model without"
    with pytest.raises(ValueError, match=message):
        AttentionOffloadImpl(4, 64, 0.125, num_kv_heads=2, **extra)


def test_attributes_of_layers() -> None:
    """As vLLM's models give them; absent ones are off."""
    plain = AttentionOffloadImpl(4, 64, 0.125, num_kv_heads=2, chunk_lookback=None)
    assert plain.attention.sliding_window == plain.attention.soft_cap == 0
    assert plain.attention.alibi_slopes is plain.attention.sinks is None
    sinks = torch.nn.Parameter(torch.zeros(4))
    torch.set_default_dtype(torch.bfloat16)  # as while vLLM makes a model's layers
    try:
        layer = AttentionOffloadImpl(
            *(4, 64, 0.125, 2, [0.7, 0.25, 0.125, 0.0625], 128, "auto", 50.0),
            sinks=sinks,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert (layer.attention.sliding_window, layer.attention.soft_cap) == (128, 50.0)
    assert layer.attention.alibi_slopes is not None
    assert layer.attention.alibi_slopes.dtype == torch.float32
    slopes = torch.tensor([0.7, 0.25, 0.125, 0.0625])
    assert torch.equal(layer.attention.alibi_slopes, slopes)
    # Weights that are loaded again reach the layer.
    sinks.data.fill_(3.0)
    assert layer.attention.sinks is not None
    assert (layer.attention.sinks == 3.0).all()


def test_check_layers() -> None:
    check_layers([])
    names = [f"layers.{i} (MLAAttention)" for i in range(5)]
    with pytest.raises(ValueError, match=r"5 layer\(s\) of this model: layers\.0 .*;"):
        check_layers(names)


def test_readme_lists_every_refusal(root: Path) -> None:
    table = (root / "README.md").read_text().partition("## What is supported")[2]
    assert not [r.feature for r in UNSUPPORTED if r.feature not in table]
