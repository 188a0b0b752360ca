"""The model that does not compute: each request is answered with the tokens it came with.

Knows requests by rid and positions by length, so an answer is right whatever the scheduler does in
between: chunks, mixed batches, retractions, overlap. Keeps per request what a replay reports of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.replay.requests import Request
from benchmarks.replay.result import Served


class Planted:
    """One request's answer, and how far it has come. Times are virtual seconds, NaN until known."""

    __slots__ = (
        "answer",
        "arrived",
        "computed",
        "encoder",
        "finished",
        "first_token",
        "hit",
        "prompt_tokens",
        "recomputed",
    )

    def __init__(self, request: Request) -> None:
        self.answer = request.output.tolist()
        self.prompt_tokens = int(request.prompt.size)
        self.encoder = request.encoder
        self.arrived = self.first_token = self.finished = float("nan")
        self.computed = 0
        self.recomputed = 0
        self.hit: int | None = None

    def served(self, rid: str, retractions: int) -> Served:
        return Served(
            rid,
            self.prompt_tokens,
            len(self.answer),
            self.hit or 0,
            self.recomputed,
            retractions,
            self.arrived,
            self.first_token,
            self.finished,
        )


class NullModel:
    """Answers whole batches."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self.planted = {request.rid: Planted(request) for request in requests}

    def answer(
        self, rids: Sequence[str], starts: np.ndarray, counts: np.ndarray, now: float
    ) -> tuple[np.ndarray, list[str]]:
        """Compute ``counts[i]`` tokens of request ``rids[i]`` behind ``starts[i]``, done at `now`.

        Returns the next token of each, int64, ``[len(rids)]`` (0 in the middle of a prompt or past
        the end, which SGLang throws away), and the rids whose last token this was.
        """
        tokens = np.zeros(len(rids), dtype=np.int64)
        ended = []
        ends = (starts + counts).tolist()
        for index, (rid, start, end) in enumerate(zip(rids, starts.tolist(), ends, strict=True)):
            planted = self.planted[rid]
            if planted.hit is None:
                planted.hit = start
            if start < planted.computed:
                planted.recomputed += min(end, planted.computed) - start
            planted.computed = max(planted.computed, end)
            place = end - planted.prompt_tokens
            if not 0 <= place < len(planted.answer):
                continue
            tokens[index] = planted.answer[place]
            if place == 0 and planted.first_token != planted.first_token:
                planted.first_token = now
            if place == len(planted.answer) - 1:
                planted.finished = now
                ended.append(rid)
        return tokens, ended
