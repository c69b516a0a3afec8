# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that are used through objects whose class our source does not show."""

from __future__ import annotations

_PARALLEL = (
    "nnodes data_parallel_size data_parallel_backend pipeline_parallel_size "
    "decode_context_parallel_size prefill_context_parallel_size enable_dbo "
    "enable_fault_tolerance enable_elastic_ep distributed_executor_backend"
)
_RUNNER = "get_model kv_cache_config execute_model_state model"
#: Members by class; the layers of `Attention` have more, which vLLM sets from outside.
_MEMBERS = {
    "vllm.LLM": "llm_engine collective_rpc",
    "vllm.config.VllmConfig": (
        "additional_config attention_config cache_config compilation_config "
        "device_config ec_transfer_config instance_id kv_transfer_config lora_config "
        "max_concurrent_batches model_config observability_config parallel_config "
        "scheduler_config speculative_config"
    ),
    "vllm.config.attention.AttentionConfig": "backend_per_kind hisparse_config",
    "vllm.config.cache.CacheConfig": (
        "block_size cache_dtype enable_prefix_caching gpu_memory_utilization "
        "kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_offloading_size "
        "kv_sharing_fast_prefill num_gpu_blocks num_gpu_blocks_override "
        "prefix_match_unit"
    ),
    "vllm.config.compilation.CUDAGraphMode": "has_piecewise_cudagraphs mixed_mode",
    "vllm.config.compilation.CompilationConfig": (
        "cudagraph_mode pass_config splitting_ops static_forward_context"
    ),
    "vllm.config.compilation.PassConfig": "fuse_attn_quant",
    "vllm.config.device.DeviceConfig": "device_type",
    "vllm.config.model.ModelConfig": (
        "architecture attention_chunk_size dtype get_head_size get_num_layers "
        "get_vocab_size hf_config hf_text_config is_attention_free is_encoder_decoder "
        "is_hybrid is_mm_prefix_lm max_model_len original_max_model_len runner_type "
        "served_model_name use_mla"
    ),
    "vllm.config.observability.ObservabilityConfig": "otlp_traces_endpoint",
    "vllm.config.parallel.ParallelConfig": (
        f"{_PARALLEL} data_parallel_external_lb data_parallel_index "
        "data_parallel_size_local local_world_size node_rank_within_dp "
        "placement_group use_ray world_size"
    ),
    "vllm.config.scheduler.SchedulerConfig": (
        "async_scheduling max_num_batched_tokens max_num_seqs scheduler_cls"
    ),
    "vllm.config.speculative.SpeculativeConfig": (
        "attention_backend draft_model_config enable_adaptive_verification "
        "kv_cache_dtype max_num_new_slots_for_drafting method num_speculative_tokens "
        "parallel_drafting use_gemma4_mtp uses_draft_kv_cache uses_draft_model"
    ),
    "vllm.distributed.kv_events.EventPublisher": "publish",
    # `worker/lost_step.py` stands in its place.
    "vllm.distributed.kv_transfer.kv_connector.utils.KVOutputAggregator": (
        "aggregate ft_defer_kv_connector_outputs"
    ),
    "vllm.distributed.parallel_state.GroupCoordinator": (
        "cpu_group first_rank world_size"
    ),
    "vllm.engine.arg_utils.EngineArgs": (
        f"{_PARALLEL} _api_process_count _api_process_rank additional_config "
        "attention_backend node_rank worker_cls"
    ),
    "vllm.forward_context.ForwardContext": (
        "attn_metadata slot_mapping dp_metadata cudagraph_runtime_mode "
        "batch_descriptor is_padding moe_layer_index"
    ),
    "vllm.lora.layers.base.BaseLayerWithLoRA": "punica_wrapper",
    "vllm.lora.punica_wrapper.PunicaWrapperBase": (
        "no_lora indices_len is_prefill token_lora_indices _token_lora_indices "
        "_embeddings_indices _update_prefill_metadata"
    ),
    "vllm.model_executor.layers.attention.Attention": (
        "head_size head_size_v impl kv_cache kv_cache_dtype "
        "kv_sharing_target_layer_name layer_name num_heads num_kv_heads"
    ),
    "vllm.model_executor.models.registry._LazyRegisteredModel": "module_name",
    "vllm.model_executor.models.registry._ModelRegistry": "models",
    "vllm.model_executor.models.registry._RegisteredModel": "model_cls",
    "vllm.platforms.cuda.NvmlCudaPlatform": (
        "device_count device_name device_type is_cpu is_cuda ray_device_key "
        "visible_device_id_to_physical_device_id"
    ),
    "vllm.platforms.cpu.CpuPlatform": "device_name device_type ray_device_key",
    "vllm.utils.cpu_resource_utils.LogicalCPUInfo": "id numa_node",
    "vllm.utils.ompmultiprocessing.OMPProcessManager": "cpu_lists reserved_cpu_list",
    "vllm.v1.attention.backend.CommonAttentionMetadata": (
        "block_table_tensor causal max_query_len max_seq_len num_reqs query_start_loc "
        "query_start_loc_cpu seq_lens slot_mapping"
    ),
    "vllm.v1.core.block_pool.BlockPool": (
        "enable_kv_cache_events get_num_free_blocks hash_block_size null_block "
        "num_gpu_blocks"
    ),
    "vllm.v1.core.sched.output.CachedRequestData": "num_computed_tokens req_ids",
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "kv_cache_block_copies new_block_ids_to_zero num_scheduled_tokens "
        "scheduled_cached_reqs scheduled_spec_decode_tokens total_num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.request_queue.RequestQueue": "add_request remove_requests",
    # `engine/resident_state_manager.py` replaces both.
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": (
        "_null_block block_pool"
    ),
    "vllm.v1.engine.EngineCoreOutput": "new_token_ids request_id",
    "vllm.v1.engine.EngineCoreOutputs": "outputs",
    "vllm.v1.engine.llm_engine.LLMEngine": (
        "abort_request add_request has_unfinished_requests model_config step"
    ),
    "vllm.v1.executor.abstract.Executor": "kv_output_aggregator",
    "vllm.v1.kv_cache_interface.KVCacheConfig": (
        "kv_cache_groups kv_cache_tensors num_blocks"
    ),
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface.KVCacheSpec": "block_size page_size_bytes",
    "vllm.v1.kv_cache_interface.KVCacheTensor": (
        "block_stride layer_stride layers offset size"
    ),
    "vllm.v1.kv_cache_interface.MambaSpec": (
        "num_prefill_checkpoint_blocks page_size_padded state_content_size_bytes"
    ),
    "vllm.v1.outputs.AsyncModelRunnerOutput": "get_output",
    "vllm.v1.request.Request": "num_computed_tokens request_id status",
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner": "warming_up_model",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": _RUNNER,
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": _RUNNER,
}
#: Dotted names, each of one supported version of vLLM or of several.
REACHED = (
    *(f"{owner}.{name}" for owner, names in _MEMBERS.items() for name in names.split()),
    "vllm.v1.worker.gpu.warmup.warmup_kernels",
)
