"""Whether a layer type's answers agree with each other, and with who reads its pages.

Two things are held against `LayerKind.dead` and `LayerPolicy.update_last_access`: the policy itself
(a request must not give back what its policy says it reads) and a layer as it was built (it must
read nothing that is given back, or that nobody keeps). Tried for lengths up to four widths, which
are all that differ for the types there are. Stdlib only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.radix.policy import Prefix, Range

Reads = Callable[[int], Iterable[Range]]
"""What the token at a position reads of those before it, in rising order."""

EVERY_LENGTH = 1 << 10
"""Up to so many tokens each length is tried, and beyond as many again, spread out."""


class Fault(NamedTuple):
    """The token at ``length`` reads the one at ``token``, which is dead or which nobody keeps."""

    length: int
    token: int
    dead: bool

    def __str__(self) -> str:
        why = "is given back by then" if self.dead else "is not kept in the cache"
        return f"the token at {self.length} reads the one at {self.token}, which {why}"


def lengths_to_try(width: int) -> Sequence[int]:
    """All lengths of short widths; of long ones some, and those beside each multiple."""
    most = 4 * width + 2
    lengths = set(range(1, min(most, EVERY_LENGTH)))
    lengths.update(range(EVERY_LENGTH, most, max(1, most // EVERY_LENGTH) | 1))
    lengths.update(times * width + beside for times in range(1, 5) for beside in range(-2, 3))
    return sorted(length for length in lengths if length > 0)


def fault(kind: LayerKind, reads: Reads | None = None) -> Fault | None:
    """The first token that is read and not there, None if there is none.

    ``reads``: of a layer as built; None for what the type's own policy says.
    """
    policy = kind.policy
    for length in lengths_to_try(getattr(kind, "width", 1)):
        kept = policy.update_last_access(Prefix(length))
        ranges = kept if reads is None else tuple(reads(length))
        dead = kind.dead(length)
        for begin, end in ranges:
            if dead is not None and begin < dead[1] and dead[0] < end:
                return Fault(length, max(begin, dead[0]), dead=True)
        lost = None if reads is None else _first_outside(ranges, kept)
        if lost is not None:
            return Fault(length, lost, dead=False)
    return None


def _first_outside(ranges: Iterable[Range], kept: Sequence[Range]) -> int | None:
    for begin, end in ranges:
        for low, high in kept:
            if low <= begin < high:
                begin = high
        if begin < end:
            return begin
    return None
