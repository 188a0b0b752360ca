"""Ranks that compare what they are and what they do, in processes of one gloo group."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest

from sglang_jenga.serving import rank_trace
from sglang_jenga.serving.rank_trace import RanksDiffer, RankTrace, TracedAllocator
from sglang_jenga.serving.ranks import Peers, differences
from tests.conftest import plan_of

SECONDS = 60.0


def test_ranks_that_agree_differ_in_nothing():
    assert differences({0: {"page size": 16}, 1: {"page size": 16}}) == ""


def test_every_difference_is_told_with_its_ranks():
    found = {
        0: {"page size": 16, "radix cache": "on", "version": "1"},
        1: {"page size": 1, "radix cache": "on", "version": "1"},
        2: {"page size": 16, "radix cache": "on"},
    }

    assert differences(found) == (
        "page size (16 on ranks 0, 2; 1 on rank 1), version (1 on ranks 0, 1; nothing on rank 2)"
    )


class Group:
    """What SGLang's ``GroupCoordinator`` has of a group: here, of all ranks."""

    def __init__(self, size: int) -> None:
        self.cpu_group, self.ranks = None, list(range(size))


def in_group(work: Any, size: int, folder: Any) -> list[Any]:
    """What ``work(rank, peers)`` returns, or raises, in each process of a gloo group."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_member, args=(work, rank, size, f"file://{folder}/meet", sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    try:
        assert all(receiver.poll(SECONDS) for receiver, _ in pipes), "a rank says nothing"
        said = [receiver.recv() for receiver, _ in pipes]
        for rank in ranks:
            rank.join(SECONDS)
        return said
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _member(work: Any, rank: int, size: int, meet: str, sender: Any) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    try:
        sender.send(work(rank, Peers(Group(size))))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()  # nobody hangs up on the others


def test_everybody_hears_what_each_has_sent(tmp_path):
    said = in_group(lambda rank, peers: peers.everybody({"rank": rank}), 3, tmp_path)

    assert said == 3 * [{0: {"rank": 0}, 1: {"rank": 1}, 2: {"rank": 2}}]


def program(core: TracedAllocator, *, in_order: bool) -> None:
    """Two extents of one page each are evicted, in one order or the other."""
    first, second = (core.adopt(0, core.alloc(["request"], [[1], [0]])[0]) for _ in range(2))
    for extent in (first, second) if in_order else (second, first):
        core.evict(extent)


def traced(rank: int, peers: Peers, *, every: int, odd: int | None) -> list[str]:
    """What was raised in each of six rounds; the ``odd`` rank goes another way in the second."""
    core = TracedAllocator(plan_of((2, 3), 8))
    trace, raised = RankTrace(core, peers, every), []
    for number in range(1, 7):
        program(core, in_order=not (rank == odd and number == 2))
        try:
            trace.note_round(idle=False)
            raised.append("")
        except RanksDiffer as error:
            raised.append(str(error))
    return raised


def test_ranks_that_do_the_same_are_left_alone(tmp_path):
    raised = in_group(lambda *args: traced(*args, every=1, odd=None), 2, tmp_path)

    assert raised == 2 * [6 * [""]]


@pytest.mark.parametrize(("every", "noticed"), [(1, 2), (4, 4)])
def test_another_order_of_evictions_is_noticed_by_all_at_the_next_comparison(
    tmp_path, every: int, noticed: int
):
    first, second = in_group(lambda *args: traced(*args, every=every, odd=1), 2, tmp_path)

    assert first == second
    assert first[: noticed - 1] == (noticed - 1) * [""]
    assert first[noticed - 1].startswith(
        f"ranks with the same requests differ in round {noticed} in evictions "
        f"({2 * noticed} with checksum "
    )


def test_ids_groups_and_their_order_are_in_the_checksum():
    sums = [rank_trace.Sum() for _ in range(4)]
    ids = np.array([3, 4], dtype=np.int64)
    for number, parts in enumerate(
        ([(0, ids)], [(1, ids)], [(0, ids[::-1].copy())], [(0, ids[:1]), (1, ids[1:])])
    ):
        for part in parts:
            sums[number].add(*part)

    assert len({item.crc for item in sums}) == 4


def test_an_allocation_that_fails_leaves_no_trace():
    core = TracedAllocator(plan_of((2, 3), 4))
    before = core.findings()

    assert core.alloc(["request"], [[99], [0]]) is None
    assert core.findings() == before


@pytest.mark.parametrize(("text", "rounds"), [("", 0), ("0", 0), (" 5 ", 5)])
def test_the_number_of_rounds_is_read(monkeypatch, text: str, rounds: int):
    monkeypatch.setenv(rank_trace.ENV, text)

    assert rank_trace.rounds_from_environment() == rounds


def test_nothing_is_traced_unasked(monkeypatch):
    plan = plan_of((2, 3), 4)
    monkeypatch.delenv(rank_trace.ENV, raising=False)
    plain = rank_trace.build_core(plan, "packed")
    monkeypatch.setenv(rank_trace.ENV, "1")

    assert not isinstance(plain, TracedAllocator)
    assert rank_trace.trace_of(plain) is None
    assert isinstance(rank_trace.build_core(plan, "packed"), TracedAllocator)
