"""How long SGLang's scheduler spends in memory's calls, one by one.

round    whether a waiting request can be admitted, and none could: `get_new_batch_prefill`
admit    the same where some were: their look-ups, locks, slots and the new batch's tensors
check    whether the next decode step fits, evicting if it does not
prepare  the step: slots, rows, what windows give up, where states are tracked
insert   offering a prompt's pages to the tree
release  offering an answer's, giving back the rest
"""

from __future__ import annotations

from collections import defaultdict
from time import thread_time
from typing import Any

from sglang_jenga.boot.hooks import Hook

_ROUND = "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_COMMON = "sglang.srt.mem_cache.common"


class CallTimes:
    """CPU seconds of every call since they were last taken, in order."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def take(self) -> dict[str, list[float]]:
        seconds, self._seconds = self._seconds, defaultdict(list)
        return seconds

    @property
    def hooks(self) -> tuple[Hook, ...]:
        return (
            Hook(_ROUND, "around", "(self, running_batch)", self._round),
            self._timed("check", f"{_BATCH}.check_decode_mem", "(self, selected_indices)"),
            self._timed("prepare", f"{_BATCH}.prepare_for_decode", "(self)"),
            self._timed("insert", f"{_COMMON}.checkpoint_kv_cache", "(req, tree_cache)"),
            self._timed(
                "release", f"{_COMMON}.release_kv_cache", "(req, tree_cache, *, checkpoint)"
            ),
        )

    def _round(self, original: Any, scheduler: Any, running_batch: Any) -> Any:
        begin = thread_time()
        plan = original(scheduler, running_batch)
        seconds = thread_time() - begin
        self._seconds["round" if plan.batch_to_run is None else "admit"].append(seconds)
        return plan

    def _timed(self, call: str, target: str, signature: str) -> Hook:
        def timed(original: Any, *args: Any, **kwargs: Any) -> Any:
            begin = thread_time()
            result = original(*args, **kwargs)
            self._seconds[call].append(thread_time() - begin)
            return result

        return Hook(target, "around", signature, timed)
