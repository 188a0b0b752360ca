"""What is planted in an engine's process to cause, or to tell of, what would be luck otherwise.

Each is a ``prepare`` of `tests.engines.run_engine`, to be called before the engine boots.
"""

from __future__ import annotations

from typing import Any


def admit_too_many() -> None:
    """Let admission count one answer token per request, so that decoding runs out of memory."""
    from sglang.srt.managers import schedule_policy

    schedule_policy.CLIP_MAX_NEW_TOKENS = 1


MIXED = "test: a mixed step"
SAT_OUT = "test: decode rows sat out a step"


def tell_of_mixed_steps() -> None:
    """Print a line for each step of prompts that takes the decode rows along, and for each that
    leaves them out."""
    from sglang.srt.managers.scheduler import Scheduler

    plan = Scheduler.get_new_batch_prefill

    def told(self: Any, running_batch: Any) -> Any:
        chosen = plan(self, running_batch)
        if chosen.batch_to_run is not None:
            if chosen.batch_to_run.forward_mode.is_mixed():
                print(MIXED, flush=True)
            elif chosen.running_batch.reqs:
                print(SAT_OUT, flush=True)
        return chosen

    Scheduler.get_new_batch_prefill = told


def leave_out_decode_rows(every: int) -> None:
    """In each ``every``-th step of prompts there is no room for the decode rows."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    plan, has_room = Scheduler.get_new_batch_prefill, ScheduleBatch.check_decode_mem
    steps, planning = 0, False

    def planned(self: Any, running_batch: Any) -> Any:
        nonlocal planning
        planning = True
        try:
            return plan(self, running_batch)
        finally:
            planning = False

    def found_room(self: Any, *args: Any, **kwargs: Any) -> bool:
        nonlocal steps
        steps += planning
        return not (planning and steps % every == 0) and has_room(self, *args, **kwargs)

    Scheduler.get_new_batch_prefill = planned
    ScheduleBatch.check_decode_mem = found_room
