"""The functions of SGLang that a replay takes the place of, and the process that has them replaced.

Everything between them is SGLang's own, or the plugin's: queues, admission, allocation, rows,
trees, results. The driver's stopwatch times that, and stands still inside a seam. Like the plugin's
hooks, each names the signature that it was written for.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.scheduler import run_scheduler_process

from benchmarks.replay import kernels, plans
from benchmarks.replay.driver import Driver, Stuck
from sglang_jenga.boot.hooks import Hook, apply
from sglang_jenga.layers.base import Address
from sglang_jenga.serving.cache import JengaRadixCache

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_WORKER = "sglang.srt.managers.tp_worker.TpModelWorker"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_SIZES = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_TREE = "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache"


def replay_scheduler_process(play: Any, outcome: Path, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, playing `play`; pickles its driver's outcome, or the reason why
    there is none, to the file `outcome`."""
    driver = play.driver()
    plan = plans.hook(play.plan, play.largest_page_bytes)
    apply((*_hooks(driver, outcome), *kernels.HOOKS, *driver.hooks, plan))
    torch.cuda.current_stream = _NoStream
    run_scheduler_process(*args, **kwargs)


class _NoStream:
    """SGLang's unified memory waits for forwards on CUDA's stream; on the CPU none is under way."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def _hooks(driver: Driver, outcome: Path) -> tuple[Hook, ...]:
    def budget(self: Any, pre_model_load_memory: int) -> int:
        """The pool's bytes, as if profiling had found them free; states get their cut first."""
        rest = driver.play.pool_bytes / (1 << 30)
        if self.mambaish_config is not None:
            rest = self._handle_max_mamba_cache(rest)
        return int(rest * (1 << 30))

    def end(scheduler: Any) -> None:
        if driver.outcome is not None:
            _write(outcome, driver.outcome)
            scheduler.gracefully_exit = True

    def ingest(self: Any, stop_at_pause: bool = False) -> list[Any]:
        with driver.watch.paused():
            arrived = driver.arrivals(self)
            end(self)
        if arrived:
            self.process_input_requests(arrived)
        return arrived

    def forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with driver.watch.paused():
            return driver.forward(batch)

    def on_idle(original: Any, self: Any) -> None:
        with driver.watch.paused():  # a server would sleep; SGLang looks for leaks here
            original(self)
            driver.idle()
            end(self)

    def stream(self: Any, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
        with driver.watch.paused():
            driver.output(reqs)

    def abort(self: Any, abort_req: Any, req: Any) -> None:
        driver.aborted(req)

    def run(original: Any, self: Any) -> None:
        try:
            original(self)
        except Stuck as reason:
            _write(outcome, str(reason))
            raise

    # For these two the stopwatch goes on: a pause takes longer than they do.
    def evicted(self: Any, num_evicted: int, start_time: float) -> None:
        if not isinstance(self, JengaRadixCache):  # it counts the pages of all groups
            driver.recorder.evicted_tokens += num_evicted

    def evict(original: Any, self: Any, extent: Any) -> None:
        group = self.plan.groups[extent.group_id].group
        if group.kind.address is Address.ROW:
            driver.recorder.evicted_tokens += extent.size * group.tokens_per_page
        original(self, extent)

    return (
        Hook(
            f"{_SIZES}._profile_available_bytes", "replace", "(self, pre_model_load_memory)", budget
        ),
        Hook(f"{_SCHEDULER}.ingest_requests", "replace", "(self, stop_at_pause)", ingest),
        Hook(
            f"{_WORKER}.forward_batch_generation",
            "replace",
            "(self, batch, forward_batch, pp_proxy_tensors, is_verify, skip_attn_backend_init, *, "
            "capture_hidden_mode, return_kv_loc_plan)",
            forward,
        ),
        Hook(f"{_SCHEDULER}.on_idle", "around", "(self)", on_idle),
        Hook(f"{_SCHEDULER}.run_event_loop", "around", "(self)", run),
        Hook(
            f"{_STREAMER}.stream_output",
            "replace",
            "(self, reqs, return_logprob, skip_req)",
            stream,
        ),
        Hook(f"{_SCHEDULER}.send_abort_output", "replace", "(self, abort_req, req)", abort),
        Hook(
            f"{_TREE}.update_eviction_metrics",
            "replace",
            "(self, num_evicted, start_time)",
            evicted,
        ),
        Hook("sglang_jenga.pages.allocator.Allocator.evict", "around", "(self, extent)", evict),
    )


def _write(path: Path, what: Any) -> None:
    """In one piece: whoever waits for the file must not see half of it."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(what))
    part.rename(path)
