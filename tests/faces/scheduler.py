"""SGLang's own scheduler over pools of a few kilobytes and a model that computes nothing.

Its queues, admission, allocation, retraction, result processing, aborts, pauses and memory checks
run as in a server, with the plugin's hooks around them. What is missing is what has nothing to do
with memory: processes, sockets, metrics, grammars, a device.
"""

from __future__ import annotations

import copy
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.dllm.mixin.scheduler import DllmManager
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.plugins import hook_registry
from sglang.srt.runtime_context import get_server_args, process_model_config
from sglang.srt.session.session_controller import SessionController
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_jenga.boot import flags, hook_table
from sglang_jenga.testing.context import Settings
from tests.faces.pools import Pools, Shape
from tests.faces.symbols import SymbolicModel


@contextmanager
def hooked() -> Iterator[None]:
    """Inside, SGLang's functions have the plugin's hooks, as in a server; afterwards not."""
    undo: list[Callable[[], None]] = []
    try:
        table = hook_table
        for hook in (*table.ROUNDS, *table.REQUESTS, *table.WEIGHTS, *table.BYTES):
            undo.append(_patch(hook))
        with mock.patch.dict(os.environ, {flags.ENV: "jenga"}):
            yield
    finally:
        for restore in reversed(undo):
            restore()


def _patch(hook: Any) -> Callable[[], None]:
    owner_path, _, name = hook.target.rpartition(".")
    owner = hook_registry.pkgutil.resolve_name(owner_path)
    original = getattr(owner, name)
    wrapped = hook_registry._wrap_fn(original, hook.resolved(), hook_registry.HookType(hook.kind))
    setattr(owner, name, wrapped)
    importers = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__dict__.get(name) is original
    ]
    for module in importers:
        setattr(module, name, wrapped)

    def restore() -> None:
        setattr(owner, name, original)
        for module in importers:
            setattr(module, name, original)

    return restore


class _Silent:
    """Stands for a component that only tells the world; it says nothing."""

    enable_metrics = False
    is_stats_logging_rank = False
    current_scheduler_metrics_enabled = False
    num_retracted_reqs = num_generated_tokens = forward_ct_decode = 0
    last_gen_throughput = 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Outputs:
    """Where finished requests go."""

    def __init__(self) -> None:
        self.ended: dict[str, Any] = {}
        self.aborted: dict[str, dict[str, Any]] = {}  # with what reason, where nothing was sent

    def stream_output(self, reqs: Any, *_: Any) -> None:
        for req in reqs:
            if req.finished():
                self.ended.setdefault(req.rid, req)


class RigScheduler(Scheduler):
    """Its constructor is not called: it would boot a model. One pass of an event loop is `turn`."""

    def __init__(self, shape: Shape, settings: Settings, pools: Pools, order: str = "fcfs") -> None:
        self._fill_in(shape, settings, pools)
        self.schedule_policy = order
        self._build_parts()
        self._retracts = False
        self._to_do: list[Callable[[], None]] = []

    def _fill_in(self, shape: Shape, settings: Settings, pools: Pools) -> None:
        self.server_args = get_server_args()
        self.model_config = copy.copy(process_model_config())
        self.model_config.is_encoder_decoder = shape.has_encoder
        self.model_config.hf_eos_token_id = set()  # answers end by length, or where a client says
        self.device = "cpu"
        self.enable_overlap, self.enable_overlap_mlx = settings.overlap, False
        self.page_size = settings.page_size
        self.is_generation = True
        self.skip_tokenizer_init = True
        self.tokenizer = None
        self.is_initializing = False
        self.enable_lora = self.enable_lora_overlap_loading = False
        self.enable_pdmux = self.enable_hisparse = self.enable_unified_memory = False
        self.enable_hierarchical_cache = self.enable_hicache_storage = False
        self.enable_lmcache = self.enable_unified_cache_external_linker = False
        self.enable_session_radix_cache = self.require_mlp_sync = False
        self.enable_priority_scheduling = self.enable_priority_preemption = False
        self.abort_on_priority_when_disabled = False
        self.schedule_low_priority_values_first = False
        self.priority_scheduling_preemption_threshold = 0
        self.max_queued_requests = self.max_new_tokens_limit = None
        self.truncation_align_size = self.dllm_config = None
        self.dllm_manager = DllmManager(None)
        self.draft_worker = self.decode_offload_manager = self.hisparse_coordinator = None
        self.external_corpus_manager = self.rust_server = self.mm_receiver = None
        self.min_free_slots_delayer = self.prefill_delayer = self.dynamic_chunk_sizer = None
        self.scripted_scheduler_hook = self.forward_sleep_time = self.lora_drainer = None
        self.scheduler_stage_metrics = self.pad_input_ids_func = self._mm_processor = None
        self.metrics_collector = None
        self.max_prefill_bs = self.processed_tokens_counter = 0
        self.attn_dp_enabled = False
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.disaggregation_mode = DisaggregationMode.NULL

        self.req_to_token_pool, self.tree_cache = pools.rows, pools.cache
        self.token_to_kv_pool_allocator = pools.allocator
        self.is_hybrid_swa, self.is_hybrid_ssm = shape.has_windows, shape.has_states
        self.sliding_window_size = pools.cache.sliding_window_size
        self.max_total_num_tokens = self.full_tokens_per_layer = pools.longest
        self.swa_tokens_per_layer = pools.plan.num_slots(1) if shape.has_windows else None
        self.max_running_requests = shape.num_rows
        self.max_prefill_tokens = 1 << 14
        # As in SGLang's `TpModelWorker.get_worker_info`.
        self.max_req_len = min(shape.context - 1, pools.longest - 1)
        self.max_req_input_len = self.max_req_len - 5
        self.model = SymbolicModel(pools)

    def _build_parts(self) -> None:
        silent = _Silent()
        self.metrics_reporter = self.dp_attn_adapter = silent
        self.kv_events_publisher = self.load_publisher = self.load_inquirer = silent
        self.grammar_manager = SimpleNamespace(
            has_waiting_grammars=lambda: False,
            process_req_with_grammar=lambda req: False,
            abort_requests=lambda recv_req: None,
            clear=lambda: None,
            grammar_queue=(),
        )
        self.dp_attn_adapter = SimpleNamespace(
            maybe_prepare_mlp_sync_batch=lambda batch, need_sync=False: batch,
            maybe_convert_decode_to_extend=lambda batch: batch,
        )
        self.ngram_embedding_manager = SimpleNamespace(
            prepare_for_forward=lambda batch, chunked_req: batch
        )
        self.output_streamer = _Outputs()
        runner = SimpleNamespace(
            attn_backend=SimpleNamespace(needs_cpu_seq_lens=True), prefill_aware_swa=False
        )
        self.tp_worker = self.model_worker = SimpleNamespace(
            model_runner=runner,
            forward_batch_generation=self.model.forward_batch_generation,
        )
        self._war_barrier_enabled = False  # one stream here
        self.forward_stream = torch.cpu.Stream()
        self.schedule_stream = torch.cpu.Stream()
        self._results: deque[Any] | None = None
        self.init_running_status()
        self.init_chunked_prefill()
        self.init_overlap()
        self.init_load_inquirer = None
        self._pause_started_at, self._pause_intervals = None, deque()
        self._sched_idled, self._prev_step, self._prev_prefill_end_ts = False, None, None
        self.init_kv_event_lora_names()
        self.policy = SchedulePolicy(self.schedule_policy, self.tree_cache, False, False, False)
        self.new_token_ratio_tracker = NewTokenRatioTracker.from_config()
        self.load_snapshot_writer = None
        self.session_controller = SessionController(self.tree_cache)
        self.profiler_manager = silent
        self.init_pool_stats_observer()
        self.init_invariant_checker()
        self.init_beam_coordinator()
        self.batch_result_processor = SchedulerBatchResultProcessor(
            is_generation=True,
            disaggregation_mode=self.disaggregation_mode,
            enable_overlap=self.enable_overlap,
            enable_overlap_mlx=False,
            model_config=self.model_config,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
            req_to_token_pool=self.req_to_token_pool,
            decode_offload_manager=None,
            metrics_collector=None,
            metrics_reporter=self.metrics_reporter,
            draft_worker=None,
            model_worker=self.model_worker,
            logprob_result_processor=silent,
            output_streamer=self.output_streamer,
            beam_coordinator=self.beam_coordinator,
            abort_request=self.abort_request,
        )

    def _get_multimodal_inputs(self, mm_inputs: int) -> Any:
        """A rig's prompts have their pictures' tokens in them already."""
        return MultimodalInputs(mm_items=[], num_image_tokens=mm_inputs)

    def _try_apply_padded_mm_input_ids(self, *_: Any) -> bool:
        return True

    # ---- one pass of the event loop -----------------------------------------------------------

    def turn(self, *to_do: Callable[[], None]) -> None:
        """One pass of SGLang's event loop, which begins with what clients ask for."""
        self._to_do = list(to_do)
        self.gracefully_exit = False
        if self.enable_overlap:
            self.event_loop_overlap()
        else:
            self.event_loop_normal()

    def ingest_requests(self, stop_at_pause: bool = False) -> list[Any]:
        """The loop asks for messages first; it is to stop after this pass."""
        if self.gracefully_exit:  # a paused engine asks again at once
            return []
        self.gracefully_exit = True
        for act in self._to_do:
            act()
        return []

    @property
    def result_queue(self) -> deque[Any]:
        return self._results

    @result_queue.setter
    def result_queue(self, fresh: deque[Any]) -> None:
        """The overlap loop begins with an empty queue, and each `turn` begins the loop anew."""
        if self._results is None:
            self._results = fresh

    def on_idle(self) -> None:
        """As SGLang's: its strict check of all pools."""
        if not self.is_fully_idle():
            return
        leak, messages = self.invariant_checker._check_all_pools(
            self.pool_stats_observer.get_pool_stats()
        )
        assert not leak, "\n".join(messages)
        self.invariant_checker._check_req_pool()
        self.new_token_ratio_tracker.reset()

    def weights_were_exchanged(self) -> None:
        """What SGLang does once it has loaded them, with ``flush_cache=false``."""
        updater = object.__new__(SchedulerWeightUpdaterManager)
        updater.scheduler = self
        keep = SimpleNamespace(flush_cache=False)
        assert updater.flush_cache_after_weight_update(keep, True, "") == (True, "")

    def retract_next_step(self) -> None:
        self._retracts = True

    def update_running_batch(self, batch: Any) -> Any:
        if not self._retracts:
            return super().update_running_batch(batch)
        self._retracts = False
        with (
            mock.patch.object(scheduler_module, "TEST_RETRACT", True),
            mock.patch.object(scheduler_module, "TEST_RETRACT_INTERVAL", 1),
        ):
            return super().update_running_batch(batch)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        if batch.forward_mode.is_decode():
            self.batch_result_processor.process_batch_result_decode(batch, result)
        else:
            self.batch_result_processor.process_batch_result_prefill(batch, result)

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        self.output_streamer.ended.setdefault(req.rid, req)
        self.output_streamer.aborted[req.rid] = abort_req.finished_reason or {}
