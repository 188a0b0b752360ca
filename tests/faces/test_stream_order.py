"""On a card, no step reads or writes memory that another one has by then: SGLang's overlapped loop
on streams that remember what is behind what."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sglang_jenga.memory.ops import CudaOps
from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.streams import Streams, recorded

ZERO, STEP, MAP, ROW = "zeroing", "step", "map", "row"
WINDOWS = Shape(full=3, window_k=2, window=6, num_large=30, num_rows=2)
STATES = Shape(full=3, state_k=1, num_large=16, num_rows=2)
TRACKED = Settings(strategy="extra_buffer", track_interval=8)


@contextmanager
def on_streams(rig: Rig):
    """A rig whose pool and scheduler think that they are on a card."""
    streams, pools, scheduler = Streams(), rig.pools, rig.scheduler
    pools.buffer.ops = CudaOps("cpu", streams)
    pools.allocator.forward_stream = scheduler.forward_stream = streams.forward
    scheduler.schedule_stream, scheduler.device_module = streams.schedule, streams
    scheduler.forward_stream_ctx = streams.stream(streams.forward)
    scheduler._war_barrier_enabled = True
    scheduler.model_worker.last_shared_read_runner = SimpleNamespace(shared_read_done_event=None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        for owner, attribute, name in (
            (pools.buffer, "zero_large_pages", "asked to zero"),
            (scheduler.model_worker, "forward_batch_generation", STEP),
            (pools.rows, "write", ROW),
            *((slot_map, "upload", MAP) for slot_map in pools.allocator.slot_maps.values()),
        ):
            stack.enter_context(recorded(streams, owner, attribute, name))
        zero = pools.buffer.ops.zero

        def zeroing(pool, ids, size, stride):
            if size == pools.plan.large_page_bytes:
                streams.queue(ZERO)
            zero(pool, ids, size, stride)

        pools.buffer.ops.zero = zeroing
        yield streams


def served(shape: Shape, settings: Settings) -> Streams:
    """Requests beside each other, hits, and pages that change hands."""
    prompt = [1, 0, 2, 0, 1, 1, 2, 0] * 2
    with Rig(shape, settings, check=False) as rig, on_streams(rig) as streams:
        for head in ([], [2, 2], [0, 2]):
            rig.submit([*head, *prompt], 6)
            rig.turn(3)
            rig.submit([*head, *prompt], 3)
            rig.run()
        return streams


def test_pages_are_zeroed_behind_the_step_in_flight_and_before_the_next():
    streams = served(STATES, TRACKED)

    assert streams.places(ZERO)
    assert {streams.queued[place].stream for place in streams.places(ZERO)} == {"forward"}
    assert list(streams.loose(ZERO, STEP)) == []


@pytest.mark.parametrize("table", [MAP, ROW])
def test_tables_are_written_behind_the_step_in_flight_and_before_the_next(table: str):
    streams = served(WINDOWS, Settings())

    assert len(streams.places(table)) > 3
    assert {streams.queued[place].stream for place in streams.places(table)} == {"schedule"}
    assert list(streams.loose(table, STEP)) == []


def test_a_row_leads_to_other_pages_only_once_the_map_does():
    """Two requests with one prompt: the second gives its copies up for what the first has left."""
    prompt = [1, 0, 2, 0, 1, 1, 2, 0] * 2
    settings = Settings(chunk=None)
    with (
        Rig(WINDOWS, settings, check=False) as rig,
        on_streams(rig) as streams,
        recorded(streams, rig.pools.cache._rows, "repoint", "give copies up"),
    ):
        rig.submit(prompt, 6)
        rig.submit(prompt, 6)
        rig.run()

    names = [work.name for work in streams.queued]
    at = names.index("give copies up")
    assert names[at + 1 : at + 3] == [MAP, ROW]


def test_without_overlap_pages_are_zeroed_where_the_steps_run():
    streams = Streams()
    ops = CudaOps("cpu", streams)

    with ops.behind(None):
        streams.queue(ZERO)

    assert streams.queued[0].stream == "schedule"


def test_what_a_stream_uses_is_kept_until_it_has_used_it():
    streams, ids, kept = Streams(), torch.tensor([1]), []
    keeping = mock.patch.object(torch.Tensor, "record_stream", lambda *args: kept.append(args))
    with keeping, CudaOps("cpu", streams).behind(streams.forward, ids):
        pass

    assert [(tensor is ids, stream) for tensor, stream in kept] == [(True, streams.forward)]
