"""Workloads of a server that is full and has a queue: more arrives than it can serve at once.

What many requests share is small beside what they hold, so a prefix is hit only if it outlives the
rush. The same frame as `workloads.py`: frozen descriptions that build the requests they describe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.replay.draws import arrivals, rate_text, spread, tokens, zipf
from benchmarks.replay.requests import Request, Workload


@dataclass(frozen=True)
class Tenants:
    """Questions behind the system prompts of many tenants, some of them asked far more than others.

    Open loop: requests arrive at `rate`, however many wait.
    """

    tenants: int = 64
    requests: int = 600
    system: tuple[int, int] = (2000, 10_000)
    question: tuple[int, int] = (100, 1500)
    answer: tuple[int, int] = (64, 512)
    rate: float = 8.0
    popularity: float = 1.0
    """Exponent of Zipf's law."""
    seed: int = 22

    def build(self) -> Workload:
        lengths = spread(*self.system, self.tenants, [self.seed, 1])
        systems = [tokens([self.seed, 0, i], length) for i, length in enumerate(lengths)]
        asked = np.random.default_rng(self.seed).choice(
            self.tenants, self.requests, p=zipf(self.tenants, self.popularity)
        )
        times = arrivals(self.rate, self.requests, [self.seed, 2])
        questions = spread(*self.question, self.requests, [self.seed, 3])
        answers = spread(*self.answer, self.requests, [self.seed, 4])
        requests = tuple(
            Request(
                f"tenant-{i}",
                np.concatenate([systems[asked[i]], tokens([self.seed, 5, i], questions[i])]),
                tokens([self.seed, 6, i], answers[i]),
                times[i],
            )
            for i in range(self.requests)
        )
        (low, high), (short, long) = self.system, self.answer
        described = (
            f"tenants with system prompts of their own: {self.tenants} of {low:,}-{high:,} tokens, "
            f"asked by Zipf's law of exponent {self.popularity:g}, {self.requests} questions of "
            f"{self.question[0]:,}-{self.question[1]:,}, answers {short}-{long}, "
            f"{rate_text(self.rate)}"
        )
        return Workload("tenants", requests, described)


@dataclass(frozen=True)
class Bursts:
    """Every `gap` seconds `size` requests within `rush` seconds, all behind one system prompt.

    Listed burst by burst; within a burst they arrive in any order.
    """

    bursts: int = 8
    size: int = 96
    gap: float = 20.0
    rush: float = 0.5
    system: int = 1024
    question: tuple[int, int] = (500, 6000)
    answer: tuple[int, int] = (64, 512)
    seed: int = 24

    def build(self) -> Workload:
        total = self.bursts * self.size
        system = tokens([self.seed, 0], self.system)
        questions = spread(*self.question, total, [self.seed, 1])
        answers = spread(*self.answer, total, [self.seed, 2])
        delays = np.random.default_rng(self.seed).uniform(0, self.rush, total).tolist()
        requests = tuple(
            Request(
                f"burst-{i}",
                np.concatenate([system, tokens([self.seed, 3, i], questions[i])]),
                tokens([self.seed, 4, i], answers[i]),
                self.gap * (i // self.size) + delays[i],
            )
            for i in range(total)
        )
        (low, high), (short, long) = self.question, self.answer
        described = (
            f"bursts: {self.bursts} of {self.size} requests within {self.rush:g} s, one every "
            f"{self.gap:g} s, shared system prompt {self.system}, questions {low:,}-{high:,}, "
            f"answers {short}-{long}"
        )
        return Workload("bursts", requests, described)


@dataclass(frozen=True)
class Passages:
    """Retrieval: instructions, passages in the retriever's order, a question.

    Popular passages come up again and again but at other places, so mostly only the instructions
    and the first passages hit.
    """

    passages: int = 400
    passage: int = 1000
    picked: int = 8
    requests: int = 300
    instructions: int = 500
    question: int = 60
    answer: int = 256
    rate: float = 4.0
    popularity: float = 0.9
    """Exponent of Zipf's law."""
    seed: int = 23

    def build(self) -> Workload:
        rng = np.random.default_rng(self.seed)
        instructions = tokens([self.seed, 0], self.instructions)
        texts = [tokens([self.seed, 1, i], self.passage) for i in range(self.passages)]
        times = arrivals(self.rate, self.requests, [self.seed, 2])
        weights = zipf(self.passages, self.popularity)
        requests = []
        for i in range(self.requests):
            picked = rng.choice(self.passages, self.picked, replace=False, p=weights)
            question = tokens([self.seed, 3, i], self.question)
            prompt = np.concatenate([instructions, *(texts[p] for p in picked), question])
            requests.append(
                Request(f"rag-{i}", prompt, tokens([self.seed, 4, i], self.answer), times[i])
            )
        described = (
            f"retrieval: instructions {self.instructions}, {self.picked} of {self.passages} "
            f"passages of {self.passage:,} tokens by Zipf's law of exponent {self.popularity:g}, "
            f"question {self.question}, {self.requests} requests, answers {self.answer}, "
            f"{rate_text(self.rate)}"
        )
        return Workload("rag", tuple(requests), described)


@dataclass(frozen=True)
class CodingAgents:
    """Sessions on repositories: one system prompt for all, one text per repository, own contexts.

    A turn adds a tool's result and an answer. Most tools take about `tool` seconds, the others
    about `slow_tool`. Now and then, and before it grows over `longest` tokens, a session begins
    again from its first context.
    """

    sessions: int = 24
    turns: int = 10
    system: int = 32_000
    repositories: int = 6
    repository: int = 10_000
    popularity: float = 0.6
    """Exponent of Zipf's law, of repositories."""
    own: int = 5000
    """Median of a session's own context; lognormal of deviation 1, at most `most_own`."""
    most_own: int = 20_000
    result: int = 4000
    """Median of a tool's result; lognormal of deviation 0.8, within `results`."""
    results: tuple[int, int] = (200, 16_000)
    answer: tuple[int, int] = (300, 800)
    """From, and to but without."""
    tool: float = 2.0
    slow_tool: float = 15.0
    slow_share: float = 0.3
    reset_share: float = 0.05
    longest: int = 120_000
    rate: float = 0.5
    """New sessions a second."""
    seed: int = 21

    def build(self) -> Workload:
        rng = np.random.default_rng(self.seed)
        system = tokens([self.seed, 0], self.system)
        heads = [
            np.concatenate([system, tokens([self.seed, 1, i], self.repository)])
            for i in range(self.repositories)
        ]
        works_on = rng.choice(
            self.repositories, self.sessions, p=zipf(self.repositories, self.popularity)
        )
        starts = arrivals(self.rate, self.sessions, [self.seed, 2])
        requests = []
        for session in range(self.sessions):
            own = min(self.most_own, rng.lognormal(np.log(self.own), 1.0))
            first = np.concatenate(
                [heads[works_on[session]], tokens([self.seed, 3, session], int(own))]
            )
            context, before = first, None
            for turn in range(self.turns):
                result = int(np.clip(rng.lognormal(np.log(self.result), 0.8), *self.results))
                starts_over = turn > 0 and rng.random() < self.reset_share
                if starts_over or context.size + result > self.longest:
                    context = first
                prompt = np.concatenate([context, tokens([self.seed, 4, session, turn], result)])
                answer = tokens([self.seed, 5, session, turn], int(rng.integers(*self.answer)))
                at = starts[session] if before is None else self._tool_seconds(rng)
                rid = f"agentic-{session}-{turn}"
                requests.append(Request(rid, prompt, answer, at, before))
                context, before = np.concatenate([prompt, answer]), rid
        described = (
            f"coding agents: {self.sessions} sessions x {self.turns} turns, shared system prompt "
            f"{self.system:,}, {self.repositories} repositories of {self.repository:,}, own "
            f"context {self.own:,} and tool results {self.result:,} (medians), answers "
            f"{self.answer[0]}-{self.answer[1]}, tools {self.tool:g} s (some {self.slow_tool:g}), "
            f"sessions arrive {rate_text(self.rate)}"
        )
        return Workload("agentic", tuple(requests), described)

    def _tool_seconds(self, rng: np.random.Generator) -> float:
        if rng.random() < 1 - self.slow_share:
            return float(np.clip(rng.exponential(self.tool), 0.2, 20))
        return float(rng.exponential(self.slow_tool))
