"""Workloads of images that are asked about. The same frame as `workloads.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.replay.draws import arrivals, rate_text, spread, tokens
from benchmarks.replay.requests import VOCABULARY, Request, Workload


@dataclass(frozen=True)
class Pictures:
    """Images with few questions each, one image a request (MMMU-pro, lengths as JENGA's paper has).

    An image takes the tokens that SGLang pads it to in Llama 3.2 Vision. Questions come in any
    order, or, not ``mixed``, image by image.
    """

    images: int = 128
    questions: tuple[int, int] = (2, 4)
    image: int = 4 * 1601
    question: tuple[int, int] = (23, 63)
    answer: tuple[int, int] = (100, 300)
    mixed: bool = True
    rate: float = math.inf
    seed: int = 25

    @property
    def name(self) -> str:
        return "mmmu" if self.mixed else "mmmu-in-order"

    def build(self) -> Workload:
        low, high = self.questions
        counts = np.resize(np.arange(low, high + 1), self.images)
        shown = np.repeat(np.arange(self.images), counts)
        if self.mixed:
            shown = np.random.default_rng([self.seed, 0]).permutation(shown)
        questions = spread(*self.question, shown.size, [self.seed, 1])
        answers = spread(*self.answer, shown.size, [self.seed, 2])
        times = arrivals(self.rate, shown.size, [self.seed, 3])
        requests = tuple(
            Request(
                f"{self.name}-{i}",
                np.concatenate(
                    [
                        np.full(self.image, VOCABULARY + image, dtype=np.int64),
                        tokens([self.seed, 4, i], questions[i]),
                    ]
                ),
                tokens([self.seed, 5, i], answers[i]),
                times[i],
                encoder=self.image,
            )
            for i, image in enumerate(shown.tolist())
        )
        order = "in any order" if self.mixed else "image by image"
        described = (
            f"questions about images: {self.images} images of {self.image:,} tokens x {low}-{high} "
            f"questions of {self.question[0]}-{self.question[1]}, {order}, answers "
            f"{self.answer[0]}-{self.answer[1]}, {rate_text(self.rate)}"
        )
        return Workload(self.name, requests, described)
