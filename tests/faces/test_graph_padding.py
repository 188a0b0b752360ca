"""What the padded rows of a CUDA graph read and write: nothing of a request, and nothing that reads
as no number. SGLang's own metadata of capture and replay, on the tables of a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_jenga.plan.spec import STATE_SINK
from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig

PADDED = 4  # rows that the graph was captured with
WINDOWS = Shape(full=3, window_k=2, window=6, num_large=30, num_rows=4)
STATES = Shape(full=3, state_k=2, num_large=24, num_rows=4)
BOTH = Shape(full=3, window_k=2, window=6, state_k=1, num_large=40, num_rows=4)
TRACKED = Settings(strategy="extra_buffer", track_interval=8)
CELLS = [(WINDOWS, Settings()), (STATES, TRACKED), (BOTH, Settings(page_size=4))]


def serving(shape: Shape, settings: Settings, count: int) -> Rig:
    """A server in the middle of some answers, after others that have come and gone."""
    rig = Rig(shape, settings, check=False)
    rig.ask([1, 0, 2, 0, 1, 1, 2, 0], 12)
    for symbol in range(count):
        rig.submit([symbol, 0, 2, 0, 1, 1, 2, 0], 12)
    rig.turn(4)
    assert len(rig.scheduler.running_batch.reqs) == count
    return rig


def metadata(rig: Rig):
    """SGLang's metadata of recurrent layers, for graphs of up to `PADDED` rows."""
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

    runner = SimpleNamespace(
        device="cpu",
        server_args=rig.scheduler.server_args,
        is_draft_worker=False,
        req_to_token_pool=rig.pools.rows,
        token_to_kv_pool=None,
    )
    backend = type("Backend", (MambaAttnBackendBase,), {"__abstractmethods__": frozenset()})(runner)
    backend.init_cuda_graph_state(PADDED, PADDED)
    return backend


def held(rig: Rig) -> list[int]:
    """State slots of running requests, those that they are tracked in too."""
    slots = []
    for req in rig.scheduler.running_batch.reqs:
        slots.append(int(req.kv.mamba_pool_idx))
        if req.kv.mamba_ping_pong_track_buffer is not None:
            slots += req.kv.mamba_ping_pong_track_buffer.tolist()
    return slots


@pytest.mark.parametrize(("shape", "settings"), CELLS[1:])
def test_capture_writes_states_to_the_sink_alone(shape: Shape, settings: Settings):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    with serving(shape, settings, 2) as rig:
        backend = metadata(rig)
        rows = torch.zeros(PADDED, dtype=torch.int64)

        captured = backend._capture_metadata(PADDED, rows, ForwardMode.DECODE, None)

        assert captured.mamba_cache_indices.tolist() == [STATE_SINK] * PADDED
        assert not {0, STATE_SINK} & set(held(rig)) and STATE_SINK > 0  # 0 is the null rows' bytes


def graph_buffers(shape: Shape):
    """What a captured decode of `PADDED` rows reads, filled as SGLang's graph runner fills it."""
    from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry

    return build_decode_registry(
        device=torch.device("cpu"),
        max_bs=PADDED,
        max_num_token=PADDED,
        seq_len_fill_value=1,
        cache_loc_dtype=torch.int64,
        enable_mamba_track=shape.has_states,
        register_global_num_tokens=False,
        share_pool=False,
    )


def check_replay(rig: Rig, batch: Any, buffers: Any) -> None:
    """Each row that a step fills up with names null rows and null slots, and keeps no state."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    count, pools = len(batch.reqs), rig.pools
    sizes = {"raw_bs": count, "raw_num_tokens": count}
    buffers.fill_from(batch, padded_bs=PADDED, padded_num_tokens=PADDED, **sizes)
    held = {name: buffers.get_slot(name).buffer for name in buffers.slot_names()}

    assert held["req_pool_indices"][:count].tolist() == batch.req_pool_indices.tolist()
    assert held["req_pool_indices"][count:].tolist() == [0] * (PADDED - count)
    assert held["seq_lens"][count:].tolist() == [1] * (PADDED - count)
    written = held["out_cache_loc"][count:]
    read = pools.rows.req_to_token[held["req_pool_indices"][count:], 0].long()
    for slots in (written, read):
        assert not slots.any()
        assert not any(
            slot_map.tensor[slots].any() for slot_map in pools.allocator.slot_maps.values()
        )
    if rig.shape.has_states:
        assert not held["mamba_track_mask"][count:].any()
        replayed = metadata(rig)._replay_metadata(
            PADDED, held["req_pool_indices"], ForwardMode.DECODE, None, held["seq_lens"]
        )
        own = [int(req.kv.mamba_pool_idx) for req in batch.reqs]
        assert replayed.mamba_cache_indices.tolist() == [*own, *[-1] * (PADDED - count)]


@pytest.mark.parametrize(("shape", "settings"), CELLS)
def test_replay_of_a_larger_graph_leads_its_padded_rows_nowhere(shape: Shape, settings: Settings):
    """While requests end one after the other, of whom the graph's buffers still hold the rows."""
    counts = []
    with Rig(shape._replace(num_large=120, num_rows=6), settings, check=False) as rig:
        worker, buffers = rig.scheduler.model_worker, graph_buffers(shape)
        forward = worker.forward_batch_generation

        def looked_at(batch: Any, **options: Any) -> Any:
            if batch.forward_mode.is_decode():
                check_replay(rig, batch, buffers)
                counts.append(len(batch.reqs))
            return forward(batch, **options)

        worker.forward_batch_generation = looked_at
        for number in range(PADDED):
            rig.submit([number % 3, 0, 2, 0, 1, 1, 2], 12 + 3 * number)
        rig.run()

    assert set(counts) == set(range(1, PADDED + 1)) and counts[-1] == 1


@pytest.mark.parametrize(("shape", "settings"), CELLS[1:])
def test_rows_of_padding_lead_to_the_sink_after_a_flush_too(shape: Shape, settings: Settings):
    with serving(shape, settings, 2) as rig:
        rig.run()
        rig.flush()
        rig.turn()

        assert int(rig.pools.rows.get_mamba_indices(torch.tensor([0]))) == STATE_SINK
        if settings.tracked:
            tracking = rig.pools.rows.req_index_to_mamba_ping_pong_track_buffer_mapping
            assert set(tracking[0].tolist()) == {STATE_SINK}


@pytest.mark.parametrize(("shape", "settings"), CELLS)
def test_a_padded_row_attends_to_the_null_page_alone(shape: Shape, settings: Settings):
    """Row 0, one token, slot 0; and the window slot beside slot 0."""
    with serving(shape, settings, 2) as rig:
        pools = rig.pools

        assert not pools.rows.req_to_token[0].any()
        assert all(req.kv.req_pool_idx > 0 for req in rig.scheduler.running_batch.reqs)
        for slot_map in pools.allocator.slot_maps.values():
            assert not slot_map.tensor[: settings.page_size].any()


@pytest.mark.parametrize(("shape", "settings"), CELLS)
def test_whatever_padding_writes_is_read_by_no_request(shape: Shape, settings: Settings):
    """Between two steps every byte that padding may write is spoilt; all answers stay right."""
    with serving(shape, settings, 2) as rig:
        plan = rig.pools.plan
        while not rig.scheduler.is_fully_idle():
            rig.pools.buffer.bytes[: plan.null_bytes] = 0xFF
            rig.turn()

        assert not any(rig.scheduler.output_streamer.aborted)
