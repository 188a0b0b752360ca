"""Workloads of the replay: counts, totals and shared tokens against closed forms, and causality."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.replay.bench import parser_of_cells, varied
from benchmarks.replay.crowds import Bursts, Tenants
from benchmarks.replay.draws import arrivals, spread
from benchmarks.replay.facts import causality_fault, facts, reusable_tokens
from benchmarks.replay.mooncake import Mooncake, block_tokens
from benchmarks.replay.pictures import Pictures
from benchmarks.replay.profiles import PROFILES
from benchmarks.replay.requests import VOCABULARY, Request, Workload
from benchmarks.replay.workloads import (
    WORKLOADS,
    Chats,
    Documents,
    Exams,
    Phase,
    SharedPrefixes,
    agents,
    reasoning,
    shift,
)

CHATS = Chats(clients=5, rounds=4, system=64, message=(40, 40), answer=16, rate=2.0)
AGENTS = agents(clients=3, calls=6, system=512, result=(20, 200), answer=8)
DOCUMENTS = Documents(
    documents=4, questions=3, readers=3, document=(800, 1200), question=16, answer=8
)
EXAMS = Exams(subjects=3, questions=5, examples=(100, 140), question=(10, 20), answer=4)
SHIFT = shift(Phase(7, (10, 30), (4, 12)), Phase(2, (400, 600), (20, 40)), rate=5.0)
PICTURES = Pictures(images=6, image=40, question=(5, 9), answer=(4, 8))
GROUPS = SharedPrefixes(groups=6, prompts=5, system=128, question=16, answer=8, rate=10.0)

TRACE = [
    {"timestamp": 1000, "input_length": 1500, "output_length": 3, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 700, "output_length": 9, "hash_ids": [0, 7]},
    {"timestamp": 2000, "input_length": 2000, "output_length": 4, "hash_ids": [0, 1, 2, 3]},
    {"timestamp": 5000, "input_length": 9000, "output_length": 4, "hash_ids": list(range(18))},
]
TOLERANCE = 4
"""Tokens that unrelated prompts may share by chance; about 1 pair of prompts in 131,071 does."""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TRACE))
    return path


@pytest.fixture(scope="module")
def groups():
    return GROUPS.build()


# ---- closed forms -------------------------------------------------------------------------------


def test_every_round_of_a_chat_can_reuse_all_that_was_said_before():
    got = facts(CHATS.build())

    assert (got.requests, got.output_tokens) == (20, 20 * 16)
    assert got.prompt_tokens == 5 * (4 * 64 + (1 + 2 + 3 + 4) * 40 + (1 + 2 + 3) * 16)
    # Computed are the system prompt once, every message, and the last tokens of answers.
    reusable = got.prompt_tokens - 64 - 20 * 40 - 15
    assert reusable <= got.reusable_tokens <= reusable + TOLERANCE


def test_a_chat_goes_on_from_its_own_answer():
    requests = {request.rid: request for request in CHATS.build().requests}

    last = requests["multi-turn-2-3"]
    before = requests[last.after]
    said = np.concatenate([before.prompt, before.output])
    assert np.array_equal(last.prompt[: said.size], said)


def test_agents_share_their_system_prompt_and_grow_by_result_and_answer():
    got = facts(AGENTS.build())

    assert got.requests == 18
    assert got.prompt_tokens - got.reusable_tokens == pytest.approx(
        512 + 18 * 110 + 3 * 5, abs=TOLERANCE
    )


def test_default_agents_end_near_64k_tokens():
    assert agents().build().longest_tokens() == pytest.approx(65_536, rel=0.1)


def test_a_documents_later_questions_reuse_the_document():
    got = facts(DOCUMENTS.build())

    assert (got.requests, got.output_tokens) == (12, 96)
    assert got.prompt_tokens == 3 * 4 * 1000 + 12 * 16
    assert 2 * 4 * 1000 <= got.reusable_tokens <= 2 * 4 * 1000 + TOLERANCE


def test_questions_of_a_subject_reuse_its_examples():
    got = facts(EXAMS.build())

    assert (got.requests, got.output_tokens) == (15, 60)
    assert got.prompt_tokens == 5 * 3 * 120 + 15 * 15
    assert 4 * 3 * 120 <= got.reusable_tokens <= 4 * 3 * 120 + TOLERANCE


def test_questions_about_an_image_reuse_it_and_nothing_of_each_other():
    got = facts(PICTURES.build())

    assert (got.requests, got.output_tokens) == (2 * (2 + 3 + 4), 18 * 6)
    assert got.prompt_tokens == 18 * (40 + 7)
    assert (18 - 6) * 40 <= got.reusable_tokens <= (18 - 6) * 40 + TOLERANCE


@pytest.mark.parametrize("mixed", [True, False])
def test_an_image_is_one_number_that_no_text_has_and_its_questions_come_together_or_not(mixed):
    requests = replace(PICTURES, mixed=mixed).build().requests

    shown = [int(request.prompt[0]) for request in requests]
    assert (shown == sorted(shown)) == (not mixed)
    for request, image in zip(requests, shown, strict=True):
        assert request.encoder == 40 and set(request.prompt[:40].tolist()) == {image}
        assert image >= VOCABULARY > request.prompt[40:].max()


def test_a_reader_takes_the_next_document_after_the_last_question_about_one():
    requests = {request.rid: request for request in DOCUMENTS.build().requests}

    assert requests["documents-2-0"].after is None
    assert requests["documents-3-0"].after == "documents-0-2"
    assert requests["documents-3-2"].after == "documents-3-1"


def test_a_shifting_load_shares_nothing_and_takes_turns():
    workload = SHIFT.build()
    got = facts(workload)

    assert (got.requests, got.output_tokens) == (18, 2 * (7 * 8 + 2 * 30))
    assert got.prompt_tokens == 2 * (7 * 20 + 2 * 500)
    assert got.reusable_tokens <= TOLERANCE
    assert [request.prompt.size > 100 for request in workload.requests] == (
        [False] * 7 + [True] * 2
    ) * 2


def test_reasoning_answers_far_more_than_it_is_asked():
    got = facts(reasoning().build())

    assert (got.requests, got.prompt_tokens, got.output_tokens) == (96, 96 * 640, 96 * 3072)


def test_generated_groups_reuse_their_system_prompts(groups):
    got = facts(groups)

    assert (got.requests, got.output_tokens) == (30, 240)
    assert got.prompt_tokens == 30 * (128 + 16)
    assert 6 * 4 * 128 <= got.reusable_tokens <= 6 * 4 * 128 + TOLERANCE
    heads = {request.prompt[:128].tobytes() for request in groups.requests}
    assert len(heads) == 6


def test_generating_groups_leaves_the_global_generators_alone(capsys):
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)

    GROUPS.build()

    assert (random.random(), np.random.random()) == expected
    assert capsys.readouterr() == ("", "")


# ---- the trace ----------------------------------------------------------------------------------


def test_trace_prompts_share_exactly_the_blocks_with_equal_ids(trace):
    workload = Mooncake(trace, 3).build()

    assert [request.prompt.size for request in workload.requests] == [1500, 700, 2000]
    # The third shares two whole blocks and the 476 tokens that the first has of block 2, and then
    # would need the first one's answer.
    assert reusable_tokens(workload) == [0, 512, 1500]


def test_trace_times_start_at_zero_and_are_divided(trace):
    assert [request.at for request in Mooncake(trace, 3, faster=4).build().requests] == [
        0.0,
        0.25,
        0.25,
    ]


def test_shorter_traces_keep_their_shared_blocks(trace):
    workload = Mooncake(trace, 3, shorter=16).build()

    assert [request.prompt.size for request in workload.requests] == [93, 43, 125]
    assert [request.output.size for request in workload.requests] == [1, 1, 1]
    assert reusable_tokens(workload) == [0, 32, 93]


def test_too_long_requests_are_left_out_and_counted(trace):
    workload = Mooncake(trace, 2, longest=1600).build()

    assert [request.rid for request in workload.requests] == ["mooncake-0", "mooncake-1"]
    with pytest.raises(ValueError, match="has 2 requests of at most 1600 tokens"):
        Mooncake(trace, 3, longest=1600).build()


def test_a_part_of_the_families_keeps_families_whole(trace):
    # The first tokens of blocks 1 and 7 are 122,355 and 106,937: only the first divides by 3.
    workload = Mooncake(trace, 3, one_in=3).build()

    assert [request.rid for request in workload.requests] == [
        "mooncake-0",
        "mooncake-2",
        "mooncake-3",
    ]
    with pytest.raises(ValueError, match="one family in 3, not 4"):
        Mooncake(trace, 4, one_in=3).build()


def test_blocks_cannot_be_cut_in_parts_that_are_no_whole_tokens(trace):
    with pytest.raises(ValueError, match="cannot be 3x shorter"):
        Mooncake(trace, 3, shorter=3).build()


def test_block_tokens_depend_on_id_and_offset_alone():
    both = block_tokens(np.array([3, 9]), 64)

    assert np.array_equal(both[:64], block_tokens(np.array([3]), 64))
    assert np.array_equal(both[64:], block_tokens(np.array([9]), 64))
    assert np.array_equal(both[64:96], block_tokens(np.array([9]), 32))
    assert (both[:64] == both[64:]).sum() < 3


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [CHATS, AGENTS, DOCUMENTS, EXAMS, SHIFT, GROUPS, PICTURES],
    ids=lambda spec: type(spec).__name__,
)
def test_requests_are_causal_and_their_tokens_in_the_vocabulary(spec):
    workload = spec.build()

    assert causality_fault(workload) is None
    for request in workload.requests:
        for ids in (request.prompt[request.encoder :], request.output):
            assert ids.dtype == np.int64 and ids.ndim == 1
            assert ids.min() >= 1 and ids.max() < VOCABULARY


@pytest.mark.parametrize(
    "spec", [CHATS, EXAMS, DOCUMENTS, PICTURES], ids=lambda spec: type(spec).__name__
)
def test_a_workload_is_the_same_every_time_and_another_with_another_seed(spec):
    def play(workload):
        return [(r.rid, r.prompt.tobytes(), r.output.tobytes(), r.at) for r in workload.requests]

    assert play(spec.build()) == play(spec.build())
    assert play(replace(spec, seed=99).build()) != play(spec.build())


def test_spread_lengths_have_the_mean_of_their_ends():
    for low, high, count in [(10, 20, 7), (1, 2, 4), (5, 5, 3), (0, 9, 1), (80_000, 92_000, 12)]:
        lengths = spread(low, high, count, [0])
        assert len(lengths) == count and sum(lengths) == (low + high) * count // 2
        assert low <= min(lengths) and max(lengths) <= high


def test_every_workload_is_in_the_full_table_under_its_own_name():
    assert set(PROFILES["full"].workloads) == set(WORKLOADS)
    for name in ("tenants", "bursts", "rag", "agentic", "shift", "mmmu", "mmmu-in-order"):
        assert WORKLOADS[name]().name == name


def test_arrivals_come_at_their_rate():
    times = arrivals(4.0, 2000, [0])

    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.1)
    assert arrivals(float("inf"), 3, [0]) == [0.0, 0.0, 0.0]


def _request(rid, at=0.0, after=None, tokens=4):
    return Request(rid, np.arange(1, 1 + tokens), np.arange(1, 3), at, after)


@pytest.mark.parametrize(
    ("requests", "fault"),
    [
        ([_request("a"), _request("a")], "a occurs twice"),
        ([_request("a", 2.0), _request("b", 1.0)], "b arrives before the request listed"),
        ([_request("a", after="b"), _request("b")], "a follows b, which is not listed"),
        ([_request("a", -1.0)], "a arrives before the start"),
        ([_request("a", tokens=0)], "a has an empty prompt"),
    ],
)
def test_faults_of_causality_are_named(requests, fault):
    assert fault in causality_fault(Workload("faulty", tuple(requests), ""))


def test_the_last_prompt_token_and_the_last_answer_token_are_never_reused():
    same = Workload("same", (_request("a"), _request("b")), "")
    longer = Request("c", np.array([1, 2, 3, 4, 1, 2, 9]), np.array([1]), 0.0)

    assert reusable_tokens(same) == [0, 3]
    # a's prompt 1 2 3 4 and the first token, 1, of its answer 1 2.
    assert reusable_tokens(Workload("on", (_request("a"), longer), "")) == [0, 5]


@pytest.mark.parametrize("faster", ["0", "-1", "inf", "nan", "twice"])
def test_a_load_cannot_come_at_no_rate(faster, capsys):
    with pytest.raises(SystemExit) as left:
        parser_of_cells("").parse_args(["--faster", faster])
    assert left.value.code == 2
    assert "--faster" in capsys.readouterr().err.splitlines()[-1]


def test_a_load_can_be_drawn_anew_and_come_faster():
    load = Tenants(requests=20)
    same, other, fast = (
        varied(load, Namespace(seed=seed, faster=faster)).build().requests
        for seed, faster in ((0, 1.0), (1, 1.0), (0, 2.0))
    )
    assert [request.at for request in same] == [request.at for request in load.build().requests]
    assert [request.prompt.size for request in other] != [request.prompt.size for request in same]
    assert [request.at for request in fast] == pytest.approx([r.at / 2 for r in same])


def test_bursts_come_faster_and_whoever_waits_for_an_answer_keeps_its_pause():
    burst, chats = (
        varied(load, Namespace(seed=0, faster=4.0)) for load in (Bursts(), Chats(think=8.0))
    )
    assert (burst.gap, chats.think, chats.rate) == (5.0, 8.0, 16.0)
