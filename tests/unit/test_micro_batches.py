"""Who runs in a pipeline's other micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_jenga.serving.micro_batches import beside


def req(name: str, *, finished: bool = False) -> Any:
    return SimpleNamespace(rid=name, finished=lambda: finished)


def batch(*reqs: Any) -> Any:
    return SimpleNamespace(reqs=list(reqs))


def test_without_a_pipeline_nobody_runs_beside():
    assert beside(SimpleNamespace(running_batch=batch(req("a")))) == []


def test_whoever_decodes_or_is_computed_in_another_micro_batch_runs_beside_once():
    mine, decoding, prompt = req("mine"), req("decoding"), req("prompt")
    done = req("done", finished=True)
    running = [batch(mine), batch(decoding, done), batch()]
    scheduler = SimpleNamespace(
        running_batch=running[0],
        running_mbs=running,
        mbs=[batch(mine), running[1], batch(prompt)],
    )

    assert beside(scheduler) == [decoding, prompt]


def test_a_micro_batch_that_has_not_run_yet_is_empty():
    running = [batch(req("mine")), batch()]
    scheduler = SimpleNamespace(running_batch=running[0], running_mbs=running, mbs=[None, None])

    assert beside(scheduler) == []
