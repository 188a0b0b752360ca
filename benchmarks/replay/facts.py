"""What a workload is, counted without any server: tokens, and what an endless cache would hit.

The hit count is exact at token granularity and the most that any prefix cache can reach when
requests run one after another; a server under load also misses what is still being computed.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from benchmarks.replay.requests import Workload


class Facts(NamedTuple):
    requests: int
    prompt_tokens: int
    output_tokens: int
    longest_tokens: int
    reusable_tokens: int

    @property
    def reusable_share(self) -> float:
        return self.reusable_tokens / self.prompt_tokens


def facts(workload: Workload) -> Facts:
    requests = workload.requests
    return Facts(
        requests=len(requests),
        prompt_tokens=sum(request.prompt.size for request in requests),
        output_tokens=sum(request.output.size for request in requests),
        longest_tokens=workload.longest_tokens(),
        reusable_tokens=sum(reusable_tokens(workload)),
    )


def reusable_tokens(workload: Workload) -> list[int]:
    """Per request: prompt tokens that an endless cache of all earlier requests holds.

    A cache holds prompts and answers, but no answer's last token, whose KV is never computed; and
    of a prompt the last token is always computed, because its output is wanted.
    """
    # Big-endian bytes compare like the token sequences, so the neighbours in sorted order are the
    # ones that share most.
    cached: list[bytes] = []
    hits = []
    for request in workload.requests:
        sequence = np.concatenate([request.prompt, request.output[:-1]]).astype(">u4").tobytes()
        prompt = sequence[: 4 * (request.prompt.size - 1)]
        index = bisect_left(cached, sequence)
        near = cached[max(0, index - 1) : index + 1]
        hits.append(max((common_prefix(prompt, other) for other in near), default=0))
        cached.insert(index, sequence)
    return hits


def common_prefix(left: bytes, right: bytes) -> int:
    """Leading tokens of four bytes each that two sequences share."""
    length = min(len(left), len(right)) // 4
    a = np.frombuffer(left, dtype=np.uint32, count=length)
    b = np.frombuffer(right, dtype=np.uint32, count=length)
    different = np.flatnonzero(a != b)
    return int(different[0]) if different.size else length


def causality_fault(workload: Workload) -> str | None:
    """Why the requests cannot be played in their order, or None if they can."""
    seen: set[str] = set()
    arrival = 0.0
    for request in workload.requests:
        if request.rid in seen:
            return f"{request.rid} occurs twice"
        if request.prompt.size == 0 or request.output.size == 0:
            return f"{request.rid} has an empty prompt or answer"
        if request.at < 0:
            return f"{request.rid} arrives before the start"
        if request.after is None:
            if request.at < arrival:
                return f"{request.rid} arrives before the request listed ahead of it"
            arrival = request.at
        elif request.after not in seen:
            return f"{request.rid} follows {request.after}, which is not listed ahead of it"
        seen.add(request.rid)
    return None
