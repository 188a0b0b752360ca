"""Snapshots of states: the copies, and stock SGLang that caches from them on the CPU engine."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from sglang_jenga.cpu import track
from tests.models.recurrences import NUM_SLOTS, strided_pool
from tests.servers.parity import differing, model_of
from tests.servers.stock_states import serve

SOURCES = torch.tensor([1, 2, 3, -1, 4])
MASK = torch.tensor([True, False, True, True, True])
TARGETS = torch.tensor([5, 6, 0, 2, -1])
# Rows 0 and 2: the mask leaves out one, a freed source or target the last two.
COPIED = {5: 1, 0: 3}


@pytest.fixture(autouse=True)
def rng():
    torch.manual_seed(0)


def check(before: torch.Tensor, after: torch.Tensor) -> None:
    for slot in range(NUM_SLOTS):
        assert torch.equal(after[slot], before[COPIED.get(slot, slot)])


def test_states_of_tracked_requests_are_copied_and_no_others():
    conv, ssm = strided_pool(3, 2), strided_pool(4, 5)
    before = conv.clone(), ssm.clone()

    track.track_mamba_states_if_needed(conv, ssm, SOURCES, MASK, TARGETS, len(SOURCES))

    check(before[0], conv)
    check(before[1], ssm)


def test_all_layers_are_copied_at_once():
    conv, ssm = torch.randn(3, NUM_SLOTS, 2, 2), torch.randn(3, NUM_SLOTS, 4)
    before = conv.clone(), ssm.clone()

    track.track_mamba_states_all_layers(conv, ssm, SOURCES, MASK, TARGETS, len(SOURCES))

    for layer in range(3):
        check(before[0][layer], conv[layer])
        check(before[1][layer], ssm[layer])


def test_rows_behind_the_batch_are_padding():
    conv, ssm = strided_pool(2), strided_pool(2)
    before = conv.clone()

    track.track_mamba_states_if_needed(conv, ssm, SOURCES, MASK, TARGETS, 1)

    assert torch.equal(conv[5], before[1])
    assert torch.equal(conv[0], before[0])


FAMILIES = ("qwen3_next", "falcon_h1", "granite_hybrid")
WITH_OVERLAP = {"disable_overlap_schedule": False, "mamba_track_interval": 64}
TRACKED = {
    "page 1": {"mamba_radix_cache_strategy": "extra_buffer", "page_size": 1},
    "page 16 chunked": {
        "mamba_radix_cache_strategy": "extra_buffer",
        "page_size": 16,
        "chunked_prefill_size": 64,
    },
    "page 64": {"mamba_radix_cache_strategy": "extra_buffer", "page_size": 64},
    "lazy page 1": {"mamba_radix_cache_strategy": "extra_buffer_lazy", "page_size": 1},
    "lazy page 16 chunked": {
        "mamba_radix_cache_strategy": "extra_buffer_lazy",
        "page_size": 16,
        "chunked_prefill_size": 128,
    },
}


def prepare(family: str, folder: Path):
    """Model, and stock's answers with the strategy that needs no snapshots."""
    model = model_of(family, folder)
    return model, serve(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product(FAMILIES, TRACKED),
        ("nemotron_h", "page 16 chunked"),
        ("qwen3_5", "page 16 chunked"),
    ],
)
def test_stock_serves_from_snapshots_with_overlap_what_it_serves_without(prepared, family, name):
    model, expected = prepared(family)

    run = serve(model, **TRACKED[name], **WITH_OVERLAP)

    assert differing(expected, run) == 0
    assert sum(map(sum, run.cached)) > 1000


def prefills_leave_no_snapshot() -> None:
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

    MambaAttnBackendBase._track_mamba_state_extend = lambda *arguments, **more: None


def decodes_leave_no_snapshot() -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    track._tracked_slots = lambda *arguments: (nothing, nothing)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", [prefills_leave_no_snapshot, decodes_leave_no_snapshot])
def test_a_snapshot_that_is_not_taken_shows_in_the_tokens(prepared, family, fault):
    """The comparison above means something only if such a fault would break it."""
    model, expected = prepared(family)

    run = serve(model, **TRACKED["page 1"], **WITH_OVERLAP, prepare=fault)

    assert differing(expected, run) > 2
