"""What is planted in an engine's process to cause, or to tell of, what would be luck otherwise.

Each is a ``prepare`` of `engines.run_engine`, to be called before the engine boots.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def admit_too_many() -> None:
    """Let admission count one answer token per request, so that decoding runs out of memory."""
    from sglang.srt.managers import schedule_policy

    schedule_policy.CLIP_MAX_NEW_TOKENS = 1


def recount_every_round() -> None:
    """Before each round pool and trees are recounted: SGLang's check while it is busy is not
    in a pipeline's loop."""
    from sglang.srt.managers.scheduler import Scheduler

    ingest = Scheduler.ingest_requests

    def recounted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.tree_cache.sanity_check()
        return ingest(self, *args, **kwargs)

    Scheduler.ingest_requests = recounted


def retract_every(steps: int) -> None:
    """In each ``steps``-th step a request is retracted, if that is a decode step of two or more:
    SGLang's SGLANG_TEST_RETRACT, which it reads when it is imported."""
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, steps


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


def interrupt(when: Callable[[Any], bool], act: Callable[[Any], None]) -> None:
    """Let ``act`` have the scheduler, once, as soon as it is as ``when`` says: between two steps,
    where a client's call would reach it."""
    from sglang.srt.managers.scheduler import Scheduler

    ingest = Scheduler.ingest_requests
    done = False

    def ingested(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        requests = ingest(self, *args, **kwargs)
        if not done and when(self):
            done = True
            act(self)
        return requests

    Scheduler.ingest_requests = ingested


def all_have(running: int, answered: int) -> Callable[[Any], bool]:
    """So many requests run and have so many tokens each."""

    def reached(scheduler: Any) -> bool:
        reqs = scheduler.running_batch.reqs
        return len(reqs) == running and all(len(req.output_ids) >= answered for req in reqs)

    return reached


def pause(scheduler: Any) -> None:
    """What /pause_generation with mode=retract does."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))


def go_on(scheduler: Any) -> None:
    """What /continue_generation does."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))


def stop_in_place(scheduler: Any) -> None:
    """What /pause_generation with mode=in_place does."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    scheduler.pause_generation(PauseGenerationReqInput(mode="in_place"))


def abort_all(scheduler: Any) -> None:
    """What a scheduler hears of /pause_generation with mode=abort."""
    from sglang.srt.managers.io_struct import AbortReq

    scheduler.abort_request(AbortReq(abort_all=True))


def exchange_weights(scheduler: Any, model: Path, *, flush: bool = False) -> None:
    """What /update_weights_from_disk with flush_cache=false, or true, does."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(
        model_path=str(model), load_format="auto", flush_cache=flush
    )
    outcome = scheduler.weight_updater.update_weights_from_disk(request)
    assert outcome.success, outcome.message


class ForgetfulSaver:
    """A memory saver where there is none: what it takes away, and what it brings again, is NaN in
    every format, or -1."""

    def __init__(self, scheduler: Any) -> None:
        pools = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool
        self._regions = {
            "kv_cache": [pools[0].buffer.bytes, pools[1].req_to_token],
            "weights": [
                weight.data for weight in scheduler.tp_worker.model_runner.model.parameters()
            ],
            "cuda_graph": [],
        }

    def pause(self, tag: str) -> None:
        import torch

        for tensor in self._regions[tag]:
            tensor.view(torch.uint8).fill_(0xFF)

    resume = pause


def give_memory_back_and_take_it(scheduler: Any) -> None:
    """What /release_memory_occupation and then /resume_memory_occupation do, of all memory, as if
    a memory saver were at work: weights have to be exchanged next."""
    from sglang.srt.managers.io_struct import (
        ReleaseMemoryOccupationReqInput,
        ResumeMemoryOccupationReqInput,
    )

    updater = scheduler.weight_updater
    updater.memory_saver_adapter = ForgetfulSaver(scheduler)
    updater.release_memory_occupation(ReleaseMemoryOccupationReqInput())
    updater.resume_memory_occupation(ResumeMemoryOccupationReqInput())
