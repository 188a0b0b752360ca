"""Every name of SGLang that this package touches, by the moment at which it does.

`TABLE` lists the moments; the rows of a serving scheduler stand in `scheduler_table`, those of
prefill and decode servers in `transfer_table`, those for the CPU engine in `cpu_table`. Functions
of ours are named, not imported: most processes need few of them, and no torch.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_jenga.boot.cpu_table import CPU_ATTENTION, CPU_RESOLUTION, CPU_SCHEDULER
from sglang_jenga.boot.hooks import Call, Hook
from sglang_jenga.boot.rebinding import Rebinding
from sglang_jenga.boot.scheduler_table import (
    BYTES,
    EMBEDDINGS,
    IMAGES,
    REQUESTS,
    ROUNDS,
    STATES,
    WEIGHTS,
)
from sglang_jenga.boot.transfer_table import TRANSFERS

_OURS = "sglang_jenga"
_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_MODEL_CONFIG = "sglang.srt.configs.model_config"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_REGISTRY = "sglang.srt.mem_cache.registry"
_OVERRIDES = "sglang.srt.arg_groups"

FLAG = (
    Hook(
        f"{_SERVER_ARGS}.add_cli_args",
        "after",
        "(parser)",
        f"{_OURS}.boot.flags:add_flag",
        "--memory-backend on the command line",
    ),
    Hook(
        f"{_SERVER_ARGS}.from_cli_args",
        "around",
        "(cls, args)",
        f"{_OURS}.boot.flags:read_flag",
        "the flag's value travels with the record of arguments",
        "that the record still takes attributes which are no fields, and pickles them",
    ),
    Hook(
        f"{_SERVER_ARGS}.resolved_dict",
        "after",
        "(self)",
        f"{_OURS}.boot.flags:show_flag",
        "/server_info tells of the flag",
    ),
    Hook(
        f"{_SERVER_ARGS}.resolve_once",
        "around",
        "(self)",
        f"{_OURS}.plugin:resolve_once",
        "refuse what is not served, patch the launcher",
        "that a launcher resolves its record once, before it starts anything",
    ),
    Hook(
        "sglang.srt.runtime_context.publish",
        "before",
        "(server_args, *, role, hf_config, ranks)",
        f"{_OURS}.plugin:before_publish",
        "patch a scheduler before it builds anything",
        "that a scheduler publishes its record before it imports models; the names of the roles",
    ),
)
ENGINE = (
    Rebinding(
        "sglang.srt.entrypoints.engine.Engine.server_args_class",
        "around",
        "class",
        f"{_OURS}.boot.flags:record_with_backend",
        "`sgl.Engine(memory_backend=...)`",
        "that `Engine.__init__` builds its record through this attribute, after it loads plugins",
        where=f"{_OURS}.boot.flags:engine_is_imported",
    ),
)
LAUNCHER = (
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        "around",
        "(scheduler_pipe_readers, scheduler_procs)",
        f"{_OURS}.boot.refusal:wait_for_schedulers",
        "a scheduler's refusal reaches the user as one line",
        "what the launcher says of a scheduler that ended with status 1",
    ),
)
CONTROLLER = (
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController"
        ".launch_tensor_parallel_group",
        "around",
        "(self, server_args, port_args, base_gpu_id, dp_rank, worker_ports)",
        f"{_OURS}.boot.refusal:launch_group",
        "the controller ends as quietly as the scheduler that refused",
    ),
)
_MODEL = (
    Hook(
        "sglang.srt.arg_groups.overrides.post_capture_kv_sizing_planned",
        "around",
        "(server_args)",
        f"{_OURS}.boot.validate:post_capture_sizing",
        "the pool has one size for life",
        "whether another place resizes pools after graph capture",
    ),
    Hook(
        f"{_MODEL_CONFIG}.is_hybrid_swa_model",
        "around",
        "(model_architectures, hf_text_config)",
        f"{_OURS}.boot.window_models:is_hybrid",
        "models with windows that SGLang stores as full KV",
        "which models SGLang counts as hybrid by now",
    ),
    Hook(
        f"{_MODEL_CONFIG}.get_hybrid_layer_ids",
        "around",
        "(model_architectures, hf_text_config)",
        f"{_OURS}.boot.window_models:layer_ids",
        "which layers of those models have a window",
    ),
)
CONSTRUCTION = (
    Hook(
        f"{_CONFIGURATOR}.config_from_budget",
        "around",
        "(self, budget_bytes, *, cap_tokens)",
        f"{_OURS}.boot.construction:config_from_budget",
        "one pool in bytes instead of fixed parts",
        "the fields of `MemoryPoolConfig` and who reads them",
    ),
    Hook(
        f"{_CONFIGURATOR}._handle_max_mamba_cache",
        "around",
        "(self, total_rest_memory)",
        f"{_OURS}.boot.construction:handle_max_mamba_cache",
        "no share of the memory is set aside for states",
        "whether the budget is still cut here",
    ),
    Hook(
        f"{_CONFIGURATOR}.resolve_max_num_reqs",
        "around",
        "(self, token_capacity)",
        f"{_OURS}.boot.construction:resolve_max_num_reqs",
        "memory, not a number of state slots, bounds the running requests",
        "that `mambaish_config` alone makes SGLang cap them",
    ),
    Hook(
        f"{_CONFIGURATOR}._init_pools",
        "around",
        "(self, *, sizes, req_to_token_pool, token_to_kv_pool_allocator)",
        f"{_OURS}.boot.construction:init_pools",
        "our pools and allocator",
        "the fields of `_InitializedPools`; the arguments of `HybridLinearKVPool` and row pools",
    ),
    Hook(
        f"{_CONFIGURATOR}.configure",
        "after",
        "(self, *, pre_model_load_memory)",
        f"{_OURS}.boot.construction:configure",
        "nothing but our pools may serve under the flag",
    ),
)
SCHEDULER = (*_MODEL, *CONSTRUCTION, *ROUNDS, *REQUESTS, *WEIGHTS, *BYTES, *IMAGES, *CPU_ATTENTION)
_MLLAMA = "sglang.srt.models.mllama.MllamaForConditionalGeneration"
ENCODERS = (
    Hook(
        f"{_MLLAMA}.pad_input_ids",
        "around",
        "(self, input_ids, mm_inputs)",
        f"{_OURS}.serving.images:name_images",
        "each image of a request has a name of its own",
        "that images come first, all of one length, and in one tensor; `image_pad_len`, unused so "
        "far by this model",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_encoder_info_extend",
        "around",
        "(self, input_ids, seq_lens)",
        f"{_OURS}.serving.images:sort_step",
        "a hit may end between two images of a request, where SGLang stops",
        "which fields of requests it reads and writes (`_Rest`), and which of the batch",
    ),
    Hook(
        f"{_MLLAMA}._batch_image_inputs",
        "around",
        "(self, forward_batch)",
        f"{_OURS}.serving.images:images_to_encode",
        "only the images behind a hit are encoded",
        "that it takes the images from the batch's `mm_inputs`, and their tensors' names",
    ),
    Hook(
        f"{_MLLAMA}.get_full_text_row_masked_out_mask",
        "around",
        "(self, forward_batch)",
        f"{_OURS}.serving.text_rows:mask",
        "a text-only request behind one with an image gets its own tokens",
        "whether it counts a request's new tokens by now, not its encoder's; then drop the row",
    ),
)
CALLS = (
    Call(
        f"{_REGISTRY}.register_radix_cache_backend",
        "(name, factory)",
        f"{_OURS}.boot.construction:register_cache_backend",
        "the radix cache `jenga`, which the flag declares: without this plugin SGLang stops at it",
        "the fields of `TreeCacheBuildContext`; that an unknown name still stops SGLang",
    ),
    Call(
        f"{_OVERRIDES}.resolution_hooks.register_resolution_hook",
        "(name)",
        f"{_OURS}.boot.validate:register_resolution_steps",
        "models are refused as soon as SGLang knows which one it is",
        "that `handle_model_specific_adjustments` is still a step of the resolution, after "
        "`handle_gpu_memory_settings`, which reserves memory for the chunk that it finds",
    ),
    Call(
        f"{_OVERRIDES}.model_override_base.register_model_override_predicate",
        "(predicate)",
        f"{_OURS}.boot.window_models:register_overrides",
        "SGLang forces --disable-hybrid-swa-memory on models whose windows we store",
        "that predicates run after the models' own overrides",
    ),
    Call(
        f"{_OVERRIDES}.overrides.declare_resolution",
        "(server_args, source, **fields)",
        f"{_OURS}.boot.validate:before_resolution",
        "what the flag decides is set the way SGLang sets it",
    ),
)


_OWN_MODELS = f"{_OURS}.boot.own_models"
MODEL_CONFIGS = (
    Call(
        "sglang.srt.configs.linear_attn_model_registry.register_linear_attn_model",
        "(spec)",
        f"{_OWN_MODELS}:register_config",
        "Jamba is a model with states, which may be tracked",
        "the fields of `LinearAttnModelSpec`; what else is asked of a config with states",
    ),
    Call(
        "transformers.AutoConfig.register",
        "(model_type, config, exist_ok)",
        f"{_OWN_MODELS}:register_config",
        "Jamba's config says which of its layers have states, and how large",
        "whether SGLang has a config of its own for Jamba; then drop the model",
    ),
)
MODEL_CLASSES = (
    Hook(
        "sglang.srt.model_loader.utils.get_model_architecture",
        "before",
        "(model_config)",
        f"{_OWN_MODELS}:register_class",
        "Jamba's class is registered with `ModelRegistry.register` when it is looked for",
        "that every model class is looked up through it; whether SGLang has Jamba by now",
    ),
)

TRUE_WINDOWS = (
    Hook(
        f"{_MODEL_CONFIG}.ModelConfig._get_sliding_window_size",
        "after",
        "(self)",
        f"{_OURS}.boot.true_windows:window_size",
        "SGLang's window leaves out the current token, that of these configs includes it",
        "that the runner still takes the window of a model without a method for it from here",
    ),
    Hook(
        "sglang.srt.models.llama.LlamaAttention.__init__",
        "after",
        "(self, config, hidden_size, num_heads, num_kv_heads, layer_id, start_layer, rope_theta, "
        "rope_scaling, rope_is_neox_style, max_position_embeddings, quant_config, prefix, bias, "
        "reduce_results)",
        f"{_OURS}.boot.true_windows:window_of_attention",
        "Mistral's layers get the window of its config",
        "whether SGLang's Mistral keeps to its window by now; that it is still run by this class",
    ),
    Hook(
        "sglang.srt.models.transformers.TransformersBase._create_attention_instances",
        "after",
        "(self)",
        f"{_OURS}.boot.true_windows:windows_of_fallback",
        "layers run by the Transformers fallback see one token more than Transformers' own",
        "whether the fallback takes one off by now",
    ),
)


class Moment(NamedTuple):
    """Rows that are applied together; ``when`` completes "applied ..."."""

    when: str
    rows: tuple[Hook | Rebinding | Call, ...]


TABLE = (
    Moment("in every process, when SGLang loads its plugins", (*FLAG, *ENGINE)),
    Moment("by whoever resolves a configuration, and by schedulers", MODEL_CONFIGS),
    Moment("by schedulers", MODEL_CLASSES),
    Moment("under the flag, by whoever waits for schedulers", LAUNCHER),
    Moment("under the flag, by the data parallel controller", CONTROLLER),
    Moment("under the flag, by launcher and schedulers, before anything is built", SCHEDULER),
    Moment("under the flag, at the same moment, through SGLang's own registries", CALLS),
    Moment("under the flag, where a model has states", STATES),
    Moment("under the flag, with --jenga-true-windows, by schedulers", TRUE_WINDOWS),
    Moment("under the flag, where a model has an encoder", ENCODERS),
    Moment("under the flag, where a model sees images", EMBEDDINGS),
    Moment("under the flag, by prefill and decode servers", TRANSFERS),
    Moment("on the CPU engine, by every process that resolves a configuration", CPU_RESOLUTION),
    Moment("on the CPU engine, by schedulers", CPU_SCHEDULER),
)
