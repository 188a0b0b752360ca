"""Every order in which SGLang can serve the queue serves all of it."""

from __future__ import annotations

import pytest

from sglang_jenga.serving import newcomers
from tests.faces.cells import MODELS
from tests.faces.rig import Rig
from tests.faces.symbols import answer


@pytest.mark.parametrize("model", ["dense", "windows"])
@pytest.mark.parametrize(
    "order", ["fcfs", "lpm", "dfs-weight", "lof", "random", "hrrn", "shortest-prefill-first"]
)
def test_requests_whose_nodes_are_joined_by_the_next_look_up_are_served(model, order):
    with Rig(MODELS[model][1], order=order) as rig:
        prompt = answer([0], 30)
        rig.ask(prompt, 2)
        rids = [rig.submit(part, 2) for part in (prompt[:10], prompt[:20], [*prompt, 1])]
        rig.turn(60)
        assert [rig.ended(rid).reason for rid in rids] == ["length"] * 3
        rig.check_nothing_lost()


@pytest.mark.parametrize("model", ["dense", "windows"])
@pytest.mark.parametrize(
    ("order", "busy_tokens", "most_held", "gets_in"),
    [
        ("lpm", 0, 100, False),
        ("lpm", 0, 3, True),  # it has waited long enough
        ("lpm", 10**6, 100, True),  # prompts are few
        ("fcfs", 0, 100, True),  # it would hold up all behind it
    ],
)
def test_under_lpm_who_hits_little_evicts_nothing_while_prompts_keep_the_gpu_busy(
    model, order, busy_tokens, most_held, gets_in, monkeypatch
):
    monkeypatch.setattr(newcomers, "BUSY_TOKENS", busy_tokens)
    monkeypatch.setattr(newcomers, "MOST_HELD", most_held)
    length = 30 if model == "dense" else 60
    with Rig(MODELS[model][1]._replace(num_large=90), order=order) as rig:
        chat = answer([0], length)
        for last in range(3):
            rig.ask([*chat, last], 2)
        runs = rig.submit([3, 3, 3, 3], 40)
        rig.turn(3)
        newcomer = rig.submit(answer([1], length), 4)
        rig.turn(10)
        assert rig.ended(runs) is None
        running = [req.rid for req in rig.scheduler.running_batch.reqs]
        assert (rig.ended(newcomer) is not None or newcomer in running) == gets_in
        rig.run()
        assert [rig.ended(rid).reason for rid in (runs, newcomer)] == ["length"] * 2
        rig.check_nothing_lost()
