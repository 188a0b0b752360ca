"""What is replayed: requests whose prompts and answers are known beforehand, and when they arrive.

A request either arrives at a moment of virtual time or some think time after another one ended, so
a conversation stays a conversation however slow the server is. Nothing here knows a model, a pool
or an engine; what the requests stand for and how they were scaled is in `Workload.described`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

VOCABULARY = 1 << 17
"""Token ids are 1 .. VOCABULARY - 1: so many that unrelated prompts share no prefix by chance. An
image's tokens are one number beyond, its own."""


class Request(NamedTuple):
    """One request. Token ids are int64, shapes ``[prompt tokens]`` and ``[output tokens]``.

    `prompt` holds everything that is sent, earlier turns and their answers included. `output` is
    what the null model answers, never empty. `at` is virtual seconds: when it arrives or, if
    `after` names another request, how long after that one's end. The first `encoder` tokens of
    the prompt are an image's, which an encoder computes and text reads by cross attention.
    """

    rid: str
    prompt: np.ndarray
    output: np.ndarray
    at: float
    after: str | None = None
    encoder: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they were written, and one line for tables about them."""

    name: str
    requests: tuple[Request, ...]
    described: str

    @property
    def shows_images(self) -> bool:
        return any(request.encoder for request in self.requests)

    def longest_tokens(self) -> int:
        """Prompt and output of the longest request: what a server must be able to hold."""
        return max(request.prompt.size + request.output.size for request in self.requests)


class Load(Protocol):
    """What a workload is drawn from: a frozen dataclass, its fields the load's."""

    def build(self) -> Workload: ...
