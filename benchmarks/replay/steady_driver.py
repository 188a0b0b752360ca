"""The part of a steady load that lives in the scheduler process (`steady.py` says what it is)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.utils import GenerationBatchResult

from benchmarks.replay.call_times import CallTimes
from benchmarks.replay.draws import tokens, zipf
from benchmarks.replay.driver import IDLE_PASSES, Stuck
from benchmarks.replay.messages import tokenized
from benchmarks.replay.null_model import NullModel, Planted
from benchmarks.replay.requests import Request
from benchmarks.replay.steady import Seen, State, Steady
from benchmarks.replay.stopwatch import Stopwatch
from sglang_jenga.boot.hooks import Hook

WARM_STEPS = 48
"""Decode steps at the beginning of a state that are not kept."""
SPARE_STEPS = 80
"""That are kept in the first state: with the others, as many as a usual answer has tokens."""
FILLERS = 8
"""Requests at once while the pool is filled."""


class SteadyDriver:
    """Client, model and observer in the scheduler process, in place of a replay's `Driver`."""

    def __init__(self, play: Steady) -> None:
        self.play = play
        self.watch = Stopwatch()
        self.recorder = self  # who counts what is evicted
        self.evicted_tokens = 0
        self.outcome: Seen | None = None
        self._model = NullModel([])
        self._calls = CallTimes()
        self._rng = np.random.default_rng(play.crowd.seed)
        self._shares = zipf(play.crowd.tenants, 1.0)
        self._state = "queue" if play.steps is None else "spare"
        self._states: dict[str, State] = defaultdict(State)
        self._decoded = 0  # steps of this state
        self._made = self._in_flight = self._retractions = self._idle = 0
        self._scheduler: Any = None

    @property
    def hooks(self) -> tuple[Hook, ...]:
        return self._calls.hooks

    # ---- requests come and go -----------------------------------------------------------------

    def arrivals(self, scheduler: Any) -> list[Any]:
        self._scheduler = scheduler
        self._go_on()
        if self.play.turn is not None:
            self.play.turn.take()
        arrived = [self._request() for _ in range(self._clients() - self._in_flight)]
        self._in_flight += len(arrived)
        return [tokenized(request, known_length=True) for request in arrived]

    def _clients(self) -> int:
        """Requests that should be in flight now."""
        crowd = self.play.crowd
        if self._state == "queue":
            return crowd.batch + crowd.waiting
        if self._state == "filling":
            return FILLERS
        if self._state == "spare" and self._made:
            return 0
        return crowd.not_waiting

    def _request(self) -> Request:
        crowd, number = self.play.crowd, self._made
        tenant = int(self._rng.choice(crowd.tenants, p=self._shares))
        question = int(self._rng.integers(*crowd.question))
        answer = self._answer_tokens()
        self._made += 1
        system = tokens([crowd.seed, 0, tenant], crowd.system)
        prompt = np.concatenate([system, tokens([crowd.seed, 1, number], question)])
        request = Request(f"r{number}", prompt, tokens([crowd.seed, 2, number], answer), 0.0)
        self._model.planted[request.rid] = Planted(request)
        return request

    def _answer_tokens(self) -> int:
        low, high = self.play.crowd.answer
        if self._state == "spare":
            return WARM_STEPS + SPARE_STEPS
        if self._state == "filling":
            return 2
        if self._decoded == 0:
            low = 2  # so that the first ones do not end all at once
        return int(self._rng.integers(low, high))

    def output(self, reqs: list[Any]) -> None:
        for req in reqs:
            if not req.finished() or req.finished_output:
                continue
            req.finished_output = True
            if list(req.output_ids) != self._model.planted.pop(req.rid).answer:
                raise Stuck(f"{req.rid} was not answered with its planted tokens")
            self._in_flight -= 1
            self._retractions += req.retraction_count

    def aborted(self, req: Any) -> None:
        raise Stuck(f"{req.rid} was aborted by SGLang: {req.to_finish}")

    def idle(self) -> None:
        self._idle += 1
        if self._idle > IDLE_PASSES:
            raise Stuck(f"no step in {IDLE_PASSES} passes, {self._in_flight} requests in flight")

    # ---- steps --------------------------------------------------------------------------------

    def forward(self, batch: Any) -> GenerationBatchResult:
        self.watch.lap()
        self._idle = 0
        decoding = batch.forward_mode.is_decode()
        self._decoded += decoding
        calls = self._calls.take()
        if self._state != "filling" and self._decoded > WARM_STEPS:
            self._keep(self._states[self._state], calls, len(batch.reqs), decoding)
        ends = batch.seq_lens_cpu.numpy().astype(np.int64)
        starts = ends - 1 if decoding else np.array(batch.prefix_lens, dtype=np.int64)
        rids = [req.rid for req in batch.reqs]
        answers, _ = self._model.answer(rids, starts, ends - starts, 0.0)
        return GenerationBatchResult(next_token_ids=torch.from_numpy(answers))

    def _keep(
        self, state: State, calls: dict[str, list[float]], requests: int, decoding: bool
    ) -> None:
        state.memory_seconds += sum(map(sum, calls.values()))
        state.thread_seconds += self.watch.laps[-1]
        for call in ("insert", "release"):
            state.seconds[call] += calls.get(call, [])
        waiting = len(self._scheduler.waiting_queue)
        if not decoding:
            state.seconds["admit"] += [sum(calls.get("admit", [])) / requests] * requests
        elif (waiting > 0) == (self._state == "queue"):
            state.running.append(requests)
            state.waiting.append(waiting)
            parts = {call: sum(calls.get(call, [])) for call in ("round", "check", "prepare")}
            parts |= {"step": sum(parts.values()), "thread": self.watch.laps[-1]}
            for call, seconds in parts.items():
                state.seconds[call].append(seconds)

    def _go_on(self) -> None:
        """To the next state, if this one is through."""
        kept = self._states[self._state].steps
        if self.play.steps is None:
            if self._decoded > WARM_STEPS + SPARE_STEPS:
                running = self._states["queue"].running
                self.outcome = Seen(round(float(np.mean(running))) if running else 0, {}, 0)
        elif self._state == "spare":
            if self._made and self._in_flight == 0:
                self._enter("filling")
        elif self._state == "filling":
            if self.evicted_tokens > 0 or self._made > 4 * self.play.crowd.batch:
                self._enter("full")
        elif self._state == "full" and kept >= self.play.steps:
            self._enter("queue")
        elif self._state == "queue" and kept >= self.play.steps:
            self.outcome = Seen(0, dict(self._states), self._retractions)

    def _enter(self, state: str) -> None:
        self._state, self._decoded = state, 0
