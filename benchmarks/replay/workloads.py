"""Generated workloads: frozen descriptions that build the requests they describe.

Lengths, counts, rates and seeds are fields; nothing is scaled silently, and `described` repeats
them for the tables. Lengths "between a and b" are spread evenly and then shuffled, so totals are
known in closed form and only the order depends on the seed. All times are virtual seconds; a rate
of infinity means that everything is there at the start. Nothing here knows how it will be served.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from benchmarks.replay.crowds import Bursts, CodingAgents, Passages, Tenants
from benchmarks.replay.draws import arrivals, rate_text, spread, tokens
from benchmarks.replay.pictures import Pictures
from benchmarks.replay.requests import VOCABULARY, Request, Workload


@dataclass(frozen=True)
class SharedPrefixes:
    """SGLang's own generated-shared-prefix data set: groups of prompts behind a system prompt each.

    The defaults are the sizes that SGLang's benchmark uses.
    """

    groups: int = 64
    prompts: int = 16
    system: int = 2048
    question: int = 128
    answer: int = 256
    rate: float = math.inf
    seed: int = 1

    def build(self) -> Workload:
        # Here, because it takes SGLang seconds to import and no other workload needs it.
        from sglang.benchmark.datasets.generated_shared_prefix import (
            sample_generated_shared_prefix_requests,
        )

        # It draws from the global generators, and prints.
        state = random.getstate(), np.random.get_state()
        random.seed(self.seed)
        np.random.seed(self.seed)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            rows = sample_generated_shared_prefix_requests(
                num_groups=self.groups,
                prompts_per_group=self.prompts,
                system_prompt_len=self.system,
                question_len=self.question,
                output_len=self.answer,
                range_ratio=1.0,
                tokenizer=_Vocabulary(),
                seed=self.seed,
                # Not wanted; but rows with it are neither read from nor kept in a cache on disk.
                send_routing_key=True,
                input_ids=True,
            )
        random.setstate(state[0])
        np.random.set_state(state[1])
        times = arrivals(self.rate, len(rows), [self.seed, 0])
        requests = tuple(
            Request(
                f"shared-{i}",
                np.array(row.prompt, dtype=np.int64),
                tokens([self.seed, 1, i], row.output_len),
                at,
            )
            for i, (row, at) in enumerate(zip(rows, times, strict=True))
        )
        described = (
            f"generated-shared-prefix of SGLang: {self.groups} groups x {self.prompts} prompts, "
            f"system {self.system}, question {self.question}, answer {self.answer} tokens, "
            f"{rate_text(self.rate)}"
        )
        return Workload("shared-prefixes", requests, described)


class _Vocabulary:
    """What SGLang's generator asks of a tokenizer when it makes token ids."""

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(1, VOCABULARY)}


@dataclass(frozen=True)
class Chats:
    """Conversations that go on from their own answers, all behind one system prompt."""

    clients: int = 32
    rounds: int = 12
    system: int = 512
    message: tuple[int, int] = (1024, 2048)
    answer: int = 256
    think: float = 5.0
    rate: float = 4.0
    """New conversations a second."""
    seed: int = 2
    name: str = "multi-turn"
    stands_for: str = "multi-turn chat"

    def build(self) -> Workload:
        system = tokens([self.seed, 0], self.system)
        messages = spread(*self.message, self.clients * self.rounds, [self.seed, 1])
        starts = arrivals(self.rate, self.clients, [self.seed, 2])
        # Thinking takes half to one and a half times as long as the mean.
        thinks = np.random.default_rng([self.seed, 3]).uniform(
            0.5 * self.think, 1.5 * self.think, (self.clients, self.rounds)
        )
        contexts = [system] * self.clients
        requests = []
        for round_ in range(self.rounds):
            for client in range(self.clients):
                place = client * self.rounds + round_
                message = tokens([self.seed, 4, place], messages[place])
                prompt = np.concatenate([contexts[client], message])
                answer = tokens([self.seed, 5, place], self.answer)
                contexts[client] = np.concatenate([prompt, answer])
                first = round_ == 0
                requests.append(
                    Request(
                        f"{self.name}-{client}-{round_}",
                        prompt,
                        answer,
                        starts[client] if first else float(thinks[client, round_]),
                        None if first else f"{self.name}-{client}-{round_ - 1}",
                    )
                )
        low, high = self.message
        described = (
            f"{self.stands_for}: {self.clients} clients x {self.rounds} rounds, shared system "
            f"prompt {self.system}, {low}-{high} new tokens a round, answers {self.answer}, "
            f"{self.think:g} s between rounds, clients arrive {rate_text(self.rate)}"
        )
        return Workload(self.name, tuple(requests), described)


def agents(
    clients: int = 16,
    calls: int = 20,
    system: int = 8192,
    result: tuple[int, int] = (1024, 4096),
    answer: int = 96,
    think: float = 0.5,
    rate: float = 2.0,
    seed: int = 3,
) -> Chats:
    """Tool-call loops: a long shared system prompt, contexts growing to about 64k, short answers.

    The think time is the tool's.
    """
    return Chats(
        clients, calls, system, result, answer, think, rate, seed, "agents", "tool-call loops"
    )


@dataclass(frozen=True)
class Documents:
    """Readers with questions about long documents, each of them in turn (arXiv-QA).

    With fewer `readers` than documents a reader goes on to the next document after the last
    question about one; the first question of every reader is there at the start.
    """

    documents: int = 16
    questions: int = 4
    readers: int = 8
    document: tuple[int, int] = (80_000, 92_000)
    question: int = 64
    answer: int = 150
    think: float = 10.0
    seed: int = 4
    name: str = "documents"

    def build(self) -> Workload:
        lengths = spread(*self.document, self.documents, [self.seed, 0])
        requests = []
        before: list[str | None] = [None] * self.readers
        for turn in range(0, self.documents, self.readers):
            reading = range(turn, min(turn + self.readers, self.documents))
            texts = {i: tokens([self.seed, 2, i], lengths[i]) for i in reading}
            for number in range(self.questions):
                for i in reading:
                    question = tokens([self.seed, 3, i, number], self.question)
                    rid = f"{self.name}-{i}-{number}"
                    previous = before[i - turn]
                    requests.append(
                        Request(
                            rid,
                            np.concatenate([texts[i], question]),
                            tokens([self.seed, 4, i, number], self.answer),
                            0.0 if previous is None else self.think,
                            previous,
                        )
                    )
                    before[i - turn] = rid
        low, high = self.document
        described = (
            f"questions about documents: {self.documents} documents of {low:,}-{high:,} tokens x "
            f"{self.questions} questions, {self.readers} readers, answers {self.answer}, "
            f"{self.think:g} s between questions"
        )
        return Workload(self.name, tuple(requests), described)


@dataclass(frozen=True)
class Exams:
    """Short questions behind the worked examples of their subject, short answers (MMLU-pro)."""

    subjects: int = 14
    questions: int = 64
    examples: tuple[int, int] = (700, 1300)
    question: tuple[int, int] = (60, 260)
    answer: int = 16
    rate: float = math.inf
    seed: int = 5

    def build(self) -> Workload:
        total = self.subjects * self.questions
        shots = [
            tokens([self.seed, 0, subject], length)
            for subject, length in enumerate(spread(*self.examples, self.subjects, [self.seed, 1]))
        ]
        lengths = spread(*self.question, total, [self.seed, 2])
        subjects = np.random.default_rng([self.seed, 3]).permutation(
            np.repeat(np.arange(self.subjects), self.questions)
        )
        times = arrivals(self.rate, total, [self.seed, 4])
        requests = tuple(
            Request(
                f"exam-{i}",
                np.concatenate([shots[subjects[i]], tokens([self.seed, 5, i], lengths[i])]),
                tokens([self.seed, 6, i], self.answer),
                times[i],
            )
            for i in range(total)
        )
        low, high = self.examples
        described = (
            f"short questions: {self.subjects} subjects with {low}-{high} tokens of examples x "
            f"{self.questions} questions of {self.question[0]}-{self.question[1]}, answers "
            f"{self.answer}, {rate_text(self.rate)}"
        )
        return Workload("exams", requests, described)


@dataclass(frozen=True)
class Phase:
    """`count` requests with prompts and answers of lengths between two each."""

    count: int
    prompt: tuple[int, int]
    answer: tuple[int, int]

    def __str__(self) -> str:
        prompt, answer = (f"{low:,}-{high:,}" for low, high in (self.prompt, self.answer))
        return f"{self.count} prompts of {prompt} tokens with answers of {answer}"


SHORT = Phase(384, (128, 512), (128, 384))
LONG = Phase(24, (12_000, 28_000), (512, 1536))


@dataclass(frozen=True)
class Unrelated:
    """Prompts that share nothing, phase after phase: what differs is who fits.

    A phase begins when the one before has been asked for completely; with an infinite rate the
    server works them off in this order.
    """

    name: str
    stands_for: str
    phases: tuple[Phase, ...]
    rate: float = math.inf
    seed: int = 6

    def build(self) -> Workload:
        lengths: list[tuple[int, int]] = []
        for number, phase in enumerate(self.phases):
            prompts = spread(*phase.prompt, phase.count, [self.seed, 0, number])
            answers = spread(*phase.answer, phase.count, [self.seed, 1, number])
            lengths += zip(prompts, answers, strict=True)
        times = arrivals(self.rate, len(lengths), [self.seed, 2])
        requests = tuple(
            Request(
                f"{self.name}-{i}",
                tokens([self.seed, 3, i], prompt),
                tokens([self.seed, 4, i], answer),
                times[i],
            )
            for i, (prompt, answer) in enumerate(lengths)
        )
        phases = ", then ".join(map(str, self.phases))
        described = f"{self.stands_for}: {phases}, {rate_text(self.rate)}"
        return Workload(self.name, requests, described)


def shift(short: Phase = SHORT, long: Phase = LONG, repeat: int = 2, **options: Any) -> Unrelated:
    """A load that changes: short requests, then long ones, `repeat` times."""
    return Unrelated("shift", "a load that changes", (short, long) * repeat, **options)


def reasoning(
    phase: Phase = Phase(96, (256, 1024), (1024, 5120)),
    **options: Any,
) -> Unrelated:
    """Long answers to short questions: a server that almost only decodes."""
    return Unrelated("reasoning", "long answers", (phase,), seed=7, **options)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "shared-prefixes": lambda: SharedPrefixes().build(),
    "multi-turn": lambda: Chats().build(),
    "agents": lambda: agents().build(),
    "documents": lambda: Documents().build(),
    "exams": lambda: Exams().build(),
    "shift": lambda: shift().build(),
    "reasoning": lambda: reasoning().build(),
    "tenants": lambda: Tenants().build(),
    "bursts": lambda: Bursts().build(),
    "rag": lambda: Passages().build(),
    "agentic": lambda: CodingAgents().build(),
    "mmmu": lambda: Pictures().build(),
    "mmmu-in-order": lambda: Pictures(mixed=False).build(),
}
"""The generated ones at their default sizes, by name."""
