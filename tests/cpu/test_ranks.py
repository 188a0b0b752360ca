"""What several ranks need without a GPU is set where the user has not set it, and only there."""

from __future__ import annotations

import os

import pytest
import torch

from sglang_jenga.cpu.ranks import NCCL, NO_NCCL, THREADS, deal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

PREPARED = """
import os
from sglang.srt.server_args import ServerArgs
from sglang_jenga.cpu import ranks
record = ServerArgs(model_path={model!r}, device="cpu", {arguments})
record.resolve_once()
os.environ.update({env!r})
ranks.prepare(record)
answer = {{name: os.environ.get(name) for name in (ranks.NCCL, ranks.THREADS)}}
"""


@pytest.fixture
def prepared(launcher, llama):
    def prepared(arguments: str, **env: str):
        return launcher.run(PREPARED.format(model=llama, arguments=arguments, env=env))

    return prepared


def test_one_rank_needs_nothing(prepared):
    assert prepared("tp_size=1") == {NCCL: None, THREADS: None}


@pytest.mark.parametrize(
    "arguments",
    ["tp_size=2", "dp_size=2", "tp_size=2, dp_size=2, enable_dp_attention=True"],
)
def test_two_ranks_get_a_half_of_the_cores_each_and_no_nccl(prepared, arguments: str):
    found = prepared(arguments)

    assert found[NCCL] == NO_NCCL and not os.path.exists(NO_NCCL)
    if found[THREADS] is not None:  # else there is a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        parts = [[int(core) for core in part.split(",")] for part in found[THREADS].split("|")]
        assert len(parts) == 2
        assert sorted(core for part in parts for core in part) == cores or len(cores) < 2


def test_replicas_of_two_ranks_are_four(prepared):
    found = prepared("tp_size=2, dp_size=2")

    assert found[THREADS] is None or found[THREADS].count("|") == 3


def test_ranks_have_the_entry_of_their_gpu_id(prepared):
    plain, shifted = prepared("tp_size=2"), prepared("tp_size=2, base_gpu_id=1, gpu_id_step=2")

    if plain[THREADS] is not None:
        entries = shifted[THREADS].split("|")
        assert [entries[gpu_id] for gpu_id in (1, 3)] == plain[THREADS].split("|")


def test_what_the_user_has_set_stands(prepared):
    given = {NCCL: "/my/libnccl.so", THREADS: "0|0"}

    assert prepared("tp_size=2", **given) == given


@pytest.mark.parametrize(
    ("ranks", "dealt"),
    [
        (1, [[0, 1, 2, 3, 4]]),
        (2, [[0, 1], [2, 3, 4]]),
        (5, [[0], [1], [2], [3], [4]]),
        (7, [[0], [1], [2], [3], [4], [0], [1]]),
    ],
)
def test_cores_are_dealt_in_runs_and_shared_where_there_are_too_few(ranks: int, dealt):
    assert [deal(range(5), ranks, rank) for rank in range(ranks)] == dealt
