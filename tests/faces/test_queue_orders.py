"""Every order in which SGLang can serve the queue serves all of it."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.rig import Rig
from tests.faces.symbols import answer


@pytest.mark.parametrize("model", ["dense", "windows"])
@pytest.mark.parametrize(
    "order", ["fcfs", "lpm", "dfs-weight", "lof", "random", "hrrn", "shortest-prefill-first"]
)
def test_requests_whose_nodes_are_joined_by_the_next_look_up_are_served(model, order):
    from sglang.srt.managers.schedule_policy import SchedulePolicy

    with Rig(MODELS[model][1], Settings()) as rig:
        rig.scheduler.policy = SchedulePolicy(order, rig.pools.cache, False, False, False)
        prompt = answer([0], 30)
        rig.ask(prompt, 2)
        rids = [rig.submit(part, 2) for part in (prompt[:10], prompt[:20], [*prompt, 1])]
        rig.turn(60)
        assert [rig.ended(rid).reason for rid in rids] == ["length"] * 3
        rig.check_nothing_lost()
