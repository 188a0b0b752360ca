"""Models with recurrent states on the real server, against stock SGLang."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import run_engine
from sglang_jenga.testing.families import EXACT, STOCK_STATES
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE
from tests.servers.faults import poisoned_free_states, states_not_copied
from tests.servers.parity import TRACKED_FAMILIES, Cell, differing, model_of, reference, run_cell

pytestmark = pytest.mark.slow

EOS = 1  # of every tiny model
PRESSURE = Cell(1, chunked=True, overlap=False, tokens=640, states="no_buffer")
CELLS = (
    Cell(1, chunked=True, overlap=False, states="no_buffer"),
    Cell(16, chunked=True, radix=False),
    PRESSURE,
)
TRACKED_CELLS = (
    Cell(1, chunked=True, states="extra_buffer"),
    Cell(64, chunked=False, overlap=False, states="extra_buffer"),
    Cell(16, chunked=True, tokens=640, states="extra_buffer"),
    Cell(1, chunked=True, tokens=640, states="extra_buffer_lazy"),
)


def prepare(family: str, folder: Path):
    """Model, prompts and stock SGLang's answers."""
    model = model_of(family, folder)
    return model, *reference(family, model)


@pytest.mark.parametrize("family", STATE_FAMILIES)
@pytest.mark.parametrize("cell", CELLS, ids=[cell.label for cell in CELLS])
def test_tokens_are_those_of_stock_sglang(prepared, family: str, cell: Cell):
    model, waves, expected = prepared(family)

    run = run_cell(family, model, waves, cell)

    assert differing(expected, run) == 0
    if cell.radix:
        assert sum(map(sum, run.cached)) > 0


@pytest.mark.parametrize("family", TRACKED_FAMILIES)
@pytest.mark.parametrize("cell", TRACKED_CELLS, ids=[cell.label for cell in TRACKED_CELLS])
def test_tokens_are_those_of_stock_where_states_are_tracked(prepared, family: str, cell: Cell):
    """Steps overlap, and small pages may hold many tokens."""
    model, waves, expected = prepared(family)

    run = run_cell(family, model, waves, cell)

    assert differing(expected, run) == 0
    assert sum(map(sum, run.cached)) > 0


@pytest.mark.parametrize("cell", [PRESSURE, *TRACKED_CELLS[2:]], ids=lambda cell: cell.states)
def test_a_state_that_nobody_holds_is_never_read(prepared, cell: Cell):
    """Freed and evicted states read as NaN; the pool is small, so they are soon given out again,
    as states and as keys and values."""
    model, waves, expected = prepared("qwen3_next")

    run = run_engine(
        model,
        waves,
        max_new_tokens=12,
        env=EXACT,
        prepare=poisoned_free_states,
        max_mamba_cache_size=16,
        **cell.arguments(),
    )

    assert differing(expected, run) == 0


@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_the_tiny_model_shows_a_lost_state_in_its_tokens(prepared, family: str):
    """Parity means something only if a fault of this size would break it."""
    model, waves, expected = prepared(family)

    run = run_engine(
        model,
        waves,
        max_new_tokens=12,
        env=EXACT,
        prepare=states_not_copied,
        max_mamba_cache_size=400,
        **CELLS[0].arguments(),
    )

    hits = sum(hit > 0 for wave in run.cached for hit in wave)
    assert hits > 10
    # A short convolution's state is its last two tokens; the others remember hundreds.
    assert differing(expected, run) > hits // (5 if family == "lfm2" else 2)


def test_prefixes_hit_as_often_as_in_stock_and_more_under_pressure(prepared):
    """Twelve rounds of chat on equal bytes: stock's states are cut at boot, ours are not."""
    model, _, _ = prepared("qwen3_next")
    rng = random.Random(0)
    turns = [
        [[rng.randrange(3, VOCAB_SIZE) for _ in range(20)] for _ in range(8)] for _ in range(12)
    ]

    def wave_of(number: int):
        def wave(outputs: list[list[list[int]]]) -> list[list[int]]:
            prompts = []
            for chat in range(8):
                prompt: list[int] = []
                for before in range(number):
                    prompt += turns[before][chat] + outputs[before][chat]
                prompts.append(prompt + turns[number][chat])
            return prompts

        return wave

    cached = {}
    answers = {}
    for backend in ("default", "jenga"):
        run = run_engine(
            model,
            [wave_of(number) for number in range(12)],
            max_new_tokens=8,
            env=EXACT,
            memory_backend=backend,
            max_total_tokens=3000,
            chunked_prefill_size=256,
            **(STOCK_STATES | {"max_mamba_cache_size": 24}),
        )
        cached[backend] = sum(map(sum, run.cached))
        answers[backend] = run.outputs

    assert answers["jenga"] == answers["default"]
    assert cached["jenga"] >= cached["default"] > 0


def test_shared_prefixes_are_hit_as_often_as_in_stock_where_states_are_tracked(prepared):
    """SGLang asks for states by evicting states; what goes must be what is of least use instead,
    such as tokens that no state lets hit any more."""
    model, _, _ = prepared("qwen3_next")
    rng = random.Random(0)
    shared = [[rng.randrange(3, VOCAB_SIZE) for _ in range(128)] for _ in range(24)]
    prompts = [[*prefix, *range(5 + index, 13 + index)] for prefix in shared for index in range(8)]
    rng.shuffle(prompts)
    cached = {}
    for backend in ("default", "jenga"):
        run = run_engine(
            model,
            [prompts[at : at + 64] for at in range(0, len(prompts), 64)],
            max_new_tokens=8,
            env=EXACT,
            memory_backend=backend,
            max_total_tokens=2000,
            max_running_requests=8,
            chunked_prefill_size=256,
            disable_overlap_schedule=False,
            max_mamba_cache_size=27,
        )
        cached[backend] = sum(map(sum, run.cached))

    assert cached["jenga"] >= cached["default"] > 0


def test_many_requests_run_where_stock_has_cut_few_states(prepared):
    """32 asked for; stock runs a third of its state slots, since it keeps room for cached ones."""
    model, waves, _ = prepared("qwen3_next")
    most = {}
    for backend in ("default", "jenga"):
        run = run_engine(
            model,
            [waves[0]],
            max_new_tokens=12,
            env=EXACT,
            memory_backend=backend,
            max_total_tokens=8192,
            chunked_prefill_size=2048,
            decode_log_interval=1,
            **(STOCK_STATES | {"max_mamba_cache_size": 27}),
        )
        most[backend] = max(run.running)

    assert most["default"] <= 9
    assert most["jenga"] >= 30


def test_states_that_requests_are_tracked_in_make_room_for_others(prepared):
    """Bytes for 27 states. A request takes those of one for its tokens, one for its state, and two
    more with `extra_buffer`, in which it is tracked after 64 tokens. The one of `extra_buffer_lazy`
    goes when somebody else wants to run, before that length or after."""
    model, _, _ = prepared("qwen3_next")
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(32)]
    lengths = [rng.randrange(8, 48) for _ in prompts]
    most, answers = {}, {}
    for strategy in ("extra_buffer", "extra_buffer_lazy"):
        run = run_engine(
            model,
            [prompts],
            max_new_tokens=lengths,
            env=EXACT,
            memory_backend="jenga",
            max_total_tokens=64,
            chunked_prefill_size=2048,
            max_mamba_cache_size=27,
            max_running_requests=32,
            disable_overlap_schedule=False,
            mamba_radix_cache_strategy=strategy,
            mamba_track_interval=64,
            decode_log_interval=1,
        )
        most[strategy] = max(run.running)
        answers[strategy] = run.outputs

    assert answers["extra_buffer"] == answers["extra_buffer_lazy"]
    assert most["extra_buffer_lazy"] >= 1.7 * most["extra_buffer"], most


def test_a_state_is_cached_where_requests_part(prepared):
    """The second prompt shows that a prefix is shared; from the third on its state is there."""
    model, _, _ = prepared("qwen3_next")
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(130)]
    prompts = [[*shared, 3 + index, *range(20, 30)] for index in range(4)]
    cached = {}
    for backend in ("default", "jenga"):
        run = run_engine(
            model,
            [[prompt] for prompt in prompts],
            max_new_tokens=8,
            env=EXACT,
            memory_backend=backend,
            max_total_tokens=3000,
            chunked_prefill_size=256,
            **STOCK_STATES,
        )
        cached[backend] = [hit for wave in run.cached for hit in wave]

    assert cached["default"] == [0, 0, 0, 0]
    assert cached["jenga"] == [0, 0, 130, 130]


@pytest.mark.parametrize("strategy", ["extra_buffer", "extra_buffer_lazy"])
def test_the_step_in_flight_does_not_write_the_state_that_a_request_leaves(prepared, strategy: str):
    """States are tracked every 64 tokens. A prompt of 63 is tracked in its first decode step; where
    the answer stops one token before 128, the next step is in flight and tracks as well."""
    model, _, _ = prepared("qwen3_next")
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(63)] for _ in range(16)]
    others = [[rng.randrange(3, VOCAB_SIZE) for _ in range(30)] for _ in prompts]

    def branches(answers: list[list[list[int]]]) -> list[list[int]]:
        """They part from the conversations where the first tracked state is."""
        return [
            prompt + answer[:1] + other
            for prompt, answer, other in zip(prompts, answers[0], others, strict=True)
        ]

    stock = run_engine(
        model,
        [prompts, branches],
        max_new_tokens=80,
        env=EXACT,
        max_total_tokens=16384,
        **STOCK_STATES,
    )
    stops = [answer[64] for answer in stock.outputs[0]]

    run = run_engine(
        model,
        [prompts, branches],
        max_new_tokens=80,
        sampling=[{"stop_token_ids": [stop], "ignore_eos": False} for stop in stops],
        env=EXACT,
        memory_backend="jenga",
        max_total_tokens=16384,
        max_mamba_cache_size=400,
        mamba_radix_cache_strategy=strategy,
        mamba_track_interval=64,
    )

    def stopped(wave: list[list[int]]) -> list[list[int]]:
        """A model of 512 tokens may say the stop early, or the end of all."""
        ends = [{stop, EOS} for stop in stops]
        return [
            answer[: next((i + 1 for i, token in enumerate(answer) if token in end), 80)]
            for answer, end in zip(wave, ends, strict=True)
        ]

    assert sum(len(answer) == 65 for answer in run.outputs[0]) >= 4
    assert run.cached[1] == [64] * len(prompts)
    assert run.outputs == [stopped(wave) for wave in stock.outputs]
