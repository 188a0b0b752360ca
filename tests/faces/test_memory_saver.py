"""Memory that goes back to the card and comes again: SGLang's two requests of a trainer."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sglang_jenga.testing.context import Settings
from tests.faces import recount
from tests.faces.pools import Shape
from tests.faces.rig import Rig

STATES = Shape(full=3, state_k=2, num_large=24, num_rows=4)
WINDOWS = Shape(full=3, window_k=2, window=6, num_large=30, num_rows=4)


class Saver:
    """The card: what lay in a region that was paused is anything once it is resumed."""

    def __init__(self, *region: torch.Tensor) -> None:
        self._region = region
        self.paused: list[str] = []

    def pause(self, tag: str) -> None:
        self.paused.append(tag)

    def resume(self, tag: str) -> None:
        self.paused.remove(tag)
        if tag == "kv_cache":
            for tensor in self._region:
                tensor.view(torch.uint8).fill_(0xFF)  # NaN in every format


@contextmanager
def trainer(rig: Rig):
    """SGLang's component that gives memory back and takes it again."""
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    updater = object.__new__(SchedulerWeightUpdaterManager)
    updater.scheduler = rig.scheduler
    updater.is_fully_idle = rig.scheduler.is_fully_idle
    updater.flush_cache = lambda: rig.scheduler.flush_cache(empty_cache=False)
    updater.offload_tags = set()
    pools = rig.pools
    updater.memory_saver_adapter = Saver(pools.buffer.bytes, pools.rows.req_to_token)
    synchronize = SimpleNamespace(synchronize=lambda: None)
    with mock.patch("torch.get_device_module", lambda *_: synchronize):
        yield updater


def give_back_and_take(updater, *tags: str) -> None:
    asked = SimpleNamespace(tags=list(tags))
    updater.release_memory_occupation(asked)
    assert updater.memory_saver_adapter.paused == list(tags)
    updater.resume_memory_occupation(asked)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [(WINDOWS, Settings()), (STATES, Settings(strategy="extra_buffer", track_interval=8))],
)
def test_memory_that_comes_back_reads_as_zeros(shape: Shape, settings: Settings):
    with Rig(shape, settings) as rig, trainer(rig) as updater:
        rig.ask([1, 0, 2, 0, 1, 1, 2, 0], 12)

        give_back_and_take(updater, "kv_cache")

        pools = rig.pools
        assert not pools.buffer.bytes.any()
        assert not pools.rows.req_to_token.any()
        recount.nothing_is_lost(pools)
        assert rig.ask([1, 0, 2, 0, 1, 1, 2, 0], 12).hit == 0
        # Zeros read as zeros in any format.
        assert (pools.allocator.core.large.formats >= 0).sum() < pools.plan.num_large
    # And the rig has seen that the answers are right.


def test_bytes_that_stayed_are_left_alone():
    with Rig(WINDOWS, Settings()) as rig, trainer(rig) as updater:
        rig.ask([1, 0, 2, 0, 1, 1, 2, 0], 12)
        before = rig.pools.buffer.bytes.clone()

        give_back_and_take(updater, "cuda_graph")

        assert torch.equal(rig.pools.buffer.bytes, before)
        assert rig.ask([1, 0, 2, 0, 1, 1, 2, 0], 12).hit > 0
