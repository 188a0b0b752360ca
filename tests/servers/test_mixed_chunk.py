"""Prompts and decode steps in one batch (--enable-mixed-chunk): tokens are those of stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FULL_KV
from sglang_jenga.testing.pressure import (
    MIXED,
    SAT_OUT,
    admit_too_many,
    leave_out_decode_rows,
    retract_every,
    tell_of_mixed_steps,
)
from sglang_jenga.testing.tiny_models import STATE_FAMILIES
from tests.servers.parity import TOKENS_PER_STATE, Cell, differing, first_wave, model_of, next_wave

pytestmark = pytest.mark.slow

NEW_TOKENS = 40
CHATS = 24
PRESSURE_TOKENS = 500
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}


def waves():
    """Prompts, and the conversations that go on from their answers."""
    first = first_wave()[:CHATS]
    return [first, lambda answers: next_wave(first, answers[0], seed=1)[:CHATS]]


def prepare(family: str, folder: Path):
    """Model and stock SGLang's answers."""
    model = model_of(family, folder)
    stock = {"max_total_tokens": 16384} | FULL_KV.get(family, {})
    return model, run_engine(model, waves(), max_new_tokens=NEW_TOKENS, env=EXACT, **stock)


def run_mixed(family: str, model, cell: Cell, *, left_out: int | None = None) -> Run:
    def prepare() -> None:
        if left_out is not None:
            leave_out_decode_rows(every=left_out)
        tell_of_mixed_steps()
        if cell.tokens == PRESSURE_TOKENS:
            admit_too_many()
            retract_every(20)  # windows may leave room for all who are admitted

    arguments = cell.arguments()
    if family in STATE_FAMILIES:
        arguments["max_mamba_cache_size"] = cell.tokens // TOKENS_PER_STATE
    if cell.states is not None and cell.states != "no_buffer":
        # Decode rows take their part of a chunk; what is left must reach a track boundary.
        arguments |= {"mamba_track_interval": 64, "chunked_prefill_size": 160}
    return run_engine(
        model,
        waves(),
        max_new_tokens=NEW_TOKENS,
        env=EXACT | CHECKS,
        prepare=prepare,
        **arguments,
    )


def mixed(page_size: int, *, short: bool = False, **options) -> Cell:
    tokens = PRESSURE_TOKENS if short else 16384
    return Cell(page_size, chunked=True, mixed=True, tokens=tokens, **options)


END_STATES = {"overlap": False, "states": "no_buffer"}
CASES = [
    ("llama", mixed(1)),
    ("llama", mixed(16, short=True)),
    # Decode rows leave no whole number of small pages of a chunk.
    ("llama", mixed(16, radix=False)),
    ("gemma3_text", mixed(16)),
    ("gemma3_text", mixed(1, short=True)),
    ("gemma3_text", mixed(16, short=True, radix=False)),
    ("qwen3_next", mixed(1, short=True, **END_STATES)),
    ("qwen3_next", mixed(16, states="extra_buffer")),
    ("qwen3_next", mixed(1, short=True, states="extra_buffer")),
    ("qwen3_next", mixed(1, states="extra_buffer_lazy")),
    ("qwen3_next", mixed(16, short=True, states="extra_buffer_lazy")),
    ("jamba", mixed(1, short=True, **END_STATES)),
    ("jamba", mixed(16, short=True, states="extra_buffer_lazy")),
    ("jet_nemotron", mixed(1, **END_STATES)),
    ("jet_nemotron", mixed(1, short=True, **END_STATES)),
    ("jet_nemotron", mixed(16, short=True, radix=False)),
]


@pytest.mark.parametrize(
    ("family", "cell"), CASES, ids=[f"{family}: {cell.label}" for family, cell in CASES]
)
def test_tokens_are_those_of_stock_sglang(prepared, family: str, cell: Cell):
    model, expected = prepared(family)

    run = run_mixed(family, model, cell)

    assert differing(expected, run) == 0
    assert run.log.count(MIXED) > 10
    if cell.radix:
        assert sum(map(sum, run.cached)) > 0
    if cell.tokens == PRESSURE_TOKENS:
        assert run.retractions > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_decode_rows_that_find_no_room_sit_out_a_step_of_prompts(prepared, family: str):
    model, expected = prepared(family)

    run = run_mixed(family, model, mixed(16, short=True), left_out=3)

    assert run.log.count(SAT_OUT) > 10
    assert differing(expected, run) == 0
