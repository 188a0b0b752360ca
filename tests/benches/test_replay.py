"""The replay instrument: its arithmetic by hand, and its null model against a real one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay.baselines import BASELINES, CHUNK
from benchmarks.replay.clock import HARDWARE, Clock, Images, Weights, bytes_moved, flops
from benchmarks.replay.geometries import GEOMETRIES, Geometry
from benchmarks.replay.null_model import NullModel
from benchmarks.replay.occupancy import Occupancy
from benchmarks.replay.plans import max_page_plan
from benchmarks.replay.requests import Request, Workload
from benchmarks.replay.result import Result, Served, Steps, from_json, to_json
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.planner import MAX_LARGE_PAGE_BYTES, plan_pool
from sglang_jenga.plan.spec import LayerGroup

FULL = LayerGroup(Full(), (1, 3), 100)
WINDOW = LayerGroup(Window(4), (0,), 50)
STATE = LayerGroup(State(), (2,), 1000)
CROSS = LayerGroup(Cross(), (4, 5, 6), 10)
# One request decodes behind 9 tokens, another's prompt of 3 tokens is prefilled.
STARTS, COUNTS = np.array([9, 0]), np.array([1, 3])


# ---- clock --------------------------------------------------------------------------------------


def test_bytes_are_weights_once_and_what_each_layer_type_reads_and_writes():
    weights = Weights(dense_bytes=7000, active_parameters=1, query_width=1)

    full = (9 + 1 + 3) * 100 + 4 * 100
    window = (3 + 1 + 3) * 50 + 4 * 50  # three tokens of the nine are still in the window
    state = 2 * 2 * 1000  # two requests, read and written
    moved = bytes_moved(weights, (FULL, WINDOW, STATE), STARTS, COUNTS)
    assert moved == 7000 + full + window + state


def test_flops_are_two_per_parameter_and_four_per_visible_pair():
    weights = Weights(dense_bytes=0, active_parameters=11, query_width=8)

    full_pairs = 10 + (1 + 2 + 3)
    window_pairs = 4 + (1 + 2 + 3)
    expected = 2 * 11 * 4 + 4 * 8 * (2 * full_pairs + 1 * window_pairs)
    assert flops(weights, (FULL, WINDOW, STATE), STARTS, COUNTS) == expected


def test_experts_are_read_as_far_as_tokens_are_expected_to_wake_them():
    weights = Weights(100, 1, 1, expert_bytes=1000, experts=4, experts_per_token=1)

    assert weights.bytes_read(1) == 100 + 250
    assert weights.bytes_read(2) == 100 + 1000 * (1 - 0.75**2)


def test_a_step_takes_the_longer_of_bytes_and_flops_and_the_overheads():
    clock = Clock("l4", 2, 0.5, 0.25, 0.5, request_seconds=0.125, serial_seconds=4.0)
    byte_bound = Weights(dense_bytes=600e9, active_parameters=0, query_width=0)
    flop_bound = Weights(dense_bytes=0, active_parameters=121e12, query_width=0)

    overheads = 0.5 + 2 * 0.125
    assert HARDWARE["l4"][:2] == (300e9, 121e12)
    assert clock.step_seconds(byte_bound, (), STARTS, COUNTS) == 2.0 + overheads
    assert clock.step_seconds(flop_bound, (), STARTS, COUNTS) == 2 * 4 / (2 * 0.25) + overheads
    assert clock.step_seconds(byte_bound, (), STARTS, COUNTS, overlap=False) == 6.0 + overheads


def test_text_reads_its_image_in_cross_layers_and_a_new_image_is_encoded_and_written():
    weights = Weights(7000, 11, 8, encoder_bytes=500, encoder_flops=13)
    shown = Images(np.array([20, 30]), np.array([0, 30]))
    known = Images(np.array([20, 30]), np.array([0, 0]))

    def both(images):
        step = (weights, (CROSS,), STARTS, COUNTS, images)
        return bytes_moved(*step), flops(*step)

    attention = 4 * 8 * 3 * (1 * 20 + 3 * 30)
    assert both(known) == (7000 + 10 * 50, 2 * 11 * 4 + attention)
    assert both(shown) == (7000 + 500 + 10 * (50 + 30), 2 * 11 * 4 + attention + 13 * 30)
    assert both(None) == (7000, 2 * 11 * 4)
    assert weights.total_bytes == 7500


# ---- geometries and plans -----------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def test_every_group_of_the_carrier_is_smaller_by_the_same_factor(geometry: Geometry):
    for real, ours in zip(geometry.real.groups, geometry.replayed, strict=True):
        assert real.entry_bytes == ours.entry_bytes * geometry.scale
        assert (real.label, len(real.layer_ids)) == (ours.label, len(ours.layer_ids))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def test_the_replayed_pool_is_cut_like_the_real_one(geometry: Geometry):
    pool_bytes = 20 << 30
    real = plan_pool(geometry.real.groups, pool_bytes)
    ours = plan_pool(
        geometry.replayed,
        pool_bytes // geometry.scale,
        max_large_page_bytes=MAX_LARGE_PAGE_BYTES // geometry.scale,
    )

    assert [item.smalls_per_large for item in ours.groups] == [
        item.smalls_per_large for item in real.groups
    ]
    assert ours.num_large == pytest.approx(real.num_large, rel=0.01)


def test_max_page_pads_every_entry_to_the_largest_page():
    plan = max_page_plan((FULL, WINDOW), 1050)

    assert [item.small_page_bytes for item in plan.groups] == [100, 100]
    assert [item.padding_fraction for item in plan.groups] == [0, 0.5]
    assert plan.num_large == 10


# ---- baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def test_jenga_is_stock_with_one_more_flag_and_nothing_tuned(geometry: Geometry):
    stock, jenga = (BASELINES[name].server(geometry) for name in ("stock", "jenga"))

    default = {"mamba_radix_cache_strategy": "extra_buffer"} if geometry.has_states else {}
    assert stock == geometry.server | {"chunked_prefill_size": CHUNK} | default
    chunk = {} if geometry.has_mixed_chunks else {"chunked_prefill_size": CHUNK}
    assert jenga == geometry.server | {"memory_backend": "jenga"} | chunk


def test_max_page_makes_a_page_of_kv_as_large_as_a_state():
    geometry = GEOMETRIES["qwen3-next-80b"]
    arguments = BASELINES["max-page"].server(geometry, chunk=8192)

    page_size = arguments["page_size"]
    kv_bytes, state_bytes = (group.entry_bytes for group in geometry.replayed)
    assert 0 <= page_size * kv_bytes - state_bytes < 64 * kv_bytes
    assert arguments["chunked_prefill_size"] == 2 * page_size <= 8192


def test_only_what_has_a_choice_is_swept():
    gemma, gpt_oss, falcon = (
        GEOMETRIES[name] for name in ("gemma-3-27b", "gpt-oss-20b", "falcon-h1-7b")
    )

    assert BASELINES["stock"].settings(falcon) == ()
    assert BASELINES["stock-best"].settings(gemma) == ()
    assert {"swa_full_tokens_ratio": 0.2} in BASELINES["stock-best"].settings(gpt_oss)
    assert BASELINES["jenga-best"].settings(gpt_oss) == ()
    strategies = [
        item["mamba_radix_cache_strategy"] for item in BASELINES["jenga-best"].settings(falcon)
    ]
    assert strategies == ["extra_buffer", "extra_buffer_lazy", "no_buffer"]


# ---- null model and results ---------------------------------------------------------------------


def test_answers_depend_on_position_alone_and_computing_again_is_counted():
    request = Request("a", np.arange(5), np.array([70, 71]), 0.0)
    model = NullModel([request])

    def answer(start: int, count: int, now: float):
        tokens, ended = model.answer(["a"], np.array([start]), np.array([count]), now)
        return tokens.tolist(), ended

    assert answer(2, 1, 1.0) == ([0], [])  # the middle of the prompt, two tokens of it hit
    assert answer(3, 2, 2.0) == ([70], [])
    assert answer(1, 4, 3.0) == ([70], [])  # retracted: tokens 1 to 4 a second time
    assert answer(5, 1, 4.0) == ([71], ["a"])
    assert answer(6, 1, 5.0) == ([0], [])  # overlap runs one step too many
    assert model.planted["a"].served("a", 1) == Served(
        "a", 5, 2, 2, 4, 1, pytest.approx(float("nan"), nan_ok=True), 2.0, 4.0
    )


@pytest.mark.parametrize(
    ("lent", "common", "mix", "stranded"),
    [
        ([0, 0], 100, (0.5, 0.5), 0),  # anybody may have it
        ([80, 20], 0, (0.5, 0.5), 60),  # 20 of each, and 60 are left of the first
        ([80, 20], 60, (0.5, 0.5), 0),
        ([80, 20], 20, (0.5, 0.5), 40),
        ([80, 20], 0, (1.0, 0.0), 20),  # nobody asks for the second
        ([0, 30], 0, (0.5, 0.5), 30),
    ],
)
def test_stranded_bytes_are_those_that_no_mix_can_take(lent, common, mix, stranded):
    assert Occupancy([], [], lent, common, 0).stranded(mix) == stranded


def test_results_go_to_json_and_back():
    steps = Steps([1.0], [2], [3], {"full": [4]}, {"full": [5]}, [6], [7])
    result = Result(steps, [Served("a", 1, 2, 3, 4, 5, 6.0, 7.0, 8.0)], {"steps": 1.0}, {"a": "b"})

    assert from_json(json.loads(json.dumps(to_json(result)))) == result


# ---- against a real model -----------------------------------------------------------------------

WINDOW_TOKENS, NEW_TOKENS, POOL_TOKENS, REQUESTS = 32, 160, 1400, 40
LIMITS = {"max_running": 32, "chunk": 128}
# Admission that expects short answers, so that decoding runs out of memory.
PRESSURE = {"max_total_tokens": POOL_TOKENS, "schedule_conservativeness": 0.1}


def _prompts(vocabulary: int) -> list[list[int]]:
    """Prefixes shared by some, and no two of the same length: a request is known by its length."""
    rng = np.random.default_rng(5)
    shared = [rng.integers(3, vocabulary, length).tolist() for length in (40, 90)]
    prompts = []
    for index in range(REQUESTS):
        own = rng.integers(3, vocabulary, 20 + index).tolist()
        prompts.append((shared[index % 2] if index % 4 else []) + own)
    return prompts


def _prepare_real_engine() -> None:
    """Let admission guess how long answers are, and say in the log who is retracted.

    The requests need no care: the tokenizer sends all of a list in one message.
    """
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    create, retract = Scheduler._create_generation_req, Req.reset_for_retract

    def create_guessed(self, received, *args, **kwargs):
        received.sampling_params.ignore_eos = False
        return create(self, received, *args, **kwargs)

    def retract_and_say(self):
        print(f"retracted prompt of {len(self.origin_input_ids)}", flush=True)
        retract(self)

    Scheduler._create_generation_req = create_guessed
    Req.reset_for_retract = retract_and_say


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Geometry]:
    """A tiny model with weights, and the geometry that replays it."""
    from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

    folder = write_tiny_model(
        "gemma3_text",
        tmp_path_factory.mktemp("replay") / "model",
        num_layers=6,
        window=WINDOW_TOKENS,
    )
    for name in ("config.json", "generation_config.json"):
        written = json.loads((folder / name).read_text())
        # No token of the vocabulary ends an answer, so admission has to guess and all are long.
        (folder / name).write_text(json.dumps(written | {"eos_token_id": VOCAB_SIZE}))
    config = json.loads((folder / "config.json").read_text())
    weights = Weights(1e9, 1e9, 64)
    return folder, Geometry("tiny", config, weights, "every layer for every token", config)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["stock", "jenga"])
def test_the_null_model_is_served_exactly_as_the_real_one(backend: str, tiny):
    from benchmarks.replay.run import replay
    from sglang_jenga.testing.engines import run_engine
    from sglang_jenga.testing.tiny_models import VOCAB_SIZE

    folder, geometry = tiny
    prompts = _prompts(VOCAB_SIZE)
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    run = run_engine(
        folder,
        [prompts],
        max_new_tokens=NEW_TOKENS,
        prepare=_prepare_real_engine,
        max_running_requests=LIMITS["max_running"],
        chunked_prefill_size=LIMITS["chunk"],
        decode_log_interval=1,
        memory_backend="jenga" if backend == "jenga" else "default",
        **PRESSURE,
    )
    requests = tuple(
        Request(f"r{index}", np.array(prompt), np.array(output), 0.0)
        for index, (prompt, output) in enumerate(zip(prompts, run.outputs[0], strict=True))
    )
    workload = Workload("tiny", requests, "planted from a real model")

    def play() -> Result:
        return replay(
            geometry,
            workload,
            BASELINES[backend],
            pool_bytes=1 << 30,
            clock=Clock(),
            seconds=300,
            known_lengths=False,
            arguments=PRESSURE,
            **LIMITS,
        )

    result = play()
    running = run.running
    retracted = re.findall(r"retracted prompt of (\d+)", run.log)
    assert retracted, "the pool must be so small that requests are retracted"
    assert [served.hit_tokens for served in result.requests] == run.cached[0]
    assert {s.prompt_tokens: s.retractions for s in result.requests if s.retractions} == {
        int(length): retracted.count(length) for length in retracted
    }
    assert result.totals["peak_running"] == max(running)
    # The engine may be stopped before it has logged its last step.
    assert 0 <= result.totals["decode_steps"] - len(running) <= 1

    again = play()
    assert again.steps == result.steps
    assert again.requests == result.requests
    assert {k: v for k, v in again.totals.items() if not k.startswith("host_")} == {
        k: v for k, v in result.totals.items() if not k.startswith("host_")
    }


@pytest.mark.slow
def test_an_engine_that_answers_something_else_fails_the_replay(tiny, monkeypatch):
    from benchmarks.replay import null_model
    from benchmarks.replay.engine import ReplayFailed
    from benchmarks.replay.run import replay

    answer = null_model.NullModel.answer

    def off_by_one(self, *arguments):
        tokens, ended = answer(self, *arguments)
        return tokens + 1, ended

    monkeypatch.setattr(null_model.NullModel, "answer", off_by_one)
    request = Request("r", np.arange(3, 20), np.array([5, 6, 7]), 0.0)
    with pytest.raises(ReplayFailed, match="r was not answered with its planted tokens"):
        replay(
            tiny[1],
            Workload("one", (request,), ""),
            BASELINES["stock"],
            pool_bytes=1 << 26,
            clock=Clock(),
            seconds=120,
        )


@pytest.mark.slow
def test_a_replay_that_cannot_go_on_says_so_instead_of_hanging(tiny):
    from benchmarks.replay.engine import ReplayFailed
    from benchmarks.replay.run import replay

    request = Request("r", np.arange(3, 20), np.array([5, 6, 7]), 0.0)
    orphan = Request("orphan", np.arange(3, 20), np.array([5]), 0.0, after="nobody")
    with pytest.raises(ReplayFailed, match=r"no step in \d+ passes: 1 of 2 requests served"):
        replay(
            tiny[1],
            Workload("two", (request, orphan), ""),
            BASELINES["stock"],
            pool_bytes=1 << 26,
            clock=Clock(),
            seconds=120,
        )


@pytest.mark.slow
def test_a_request_that_no_pool_can_hold_is_named(tiny):
    from benchmarks.replay.engine import ReplayFailed
    from benchmarks.replay.run import replay

    request = Request("giant", np.arange(3, 403), np.array([5, 6, 7]), 0.0)
    with pytest.raises(ReplayFailed, match=r"giant \(400 tokens\) was refused"):
        replay(
            tiny[1],
            Workload("one", (request,), ""),
            BASELINES["stock"],
            pool_bytes=1 << 26,
            clock=Clock(),
            seconds=120,
            arguments={"max_total_tokens": 128},
        )
