"""Who waits while prompts keep the GPU busy, where the longest cached prefix goes first."""

from __future__ import annotations

BUSY_TOKENS = 512
"""Prompt tokens a step, in the mean, from which on the batch is as large as it need be. A GPU
computes 200 to 400 tokens in the time in which it reads the weights; with more, a step takes longer
for each, and a request more in the batch brings next to nothing."""

IDLE_TOKENS = 32
"""Below so many, prompts keep the GPU no longer."""

STEPS = 32
"""Steps, and requests, that a mean reaches back over."""

MOST_HELD = 512
"""Rounds at most for which nobody who computes more than it hits gets in."""


class Newcomers:
    """Newcomers are requests that compute more tokens of their prompt than they hit. Where the
    longest cached prefix goes first they come last; but where memory lets one more run, it would
    evict what the others come back for, and then all of them compute everything.

        computed' = computed + (prompt tokens of the round - computed) / STEPS
        hit'      = hit + (a request's hit - hit) / STEPS             where one is admitted
        missed'   = missed + (what it has to compute - missed) / STEPS

    While ``computed >= BUSY_TOKENS`` and ``hit >= missed`` a newcomer takes free memory and evicts
    nothing: more running requests are not worth a prefix now, and most prefixes are hit. As anybody
    whom memory refused, it is asked for again when a request has left. That may take long where
    answers are; so also once ``computed < IDLE_TOKENS``, or after MOST_HELD rounds in which no
    newcomer got in, and then one does.

    An operating system that swaps runs fewer processes by the frequency of their page faults; so
    here. Counted in tokens and rounds, not in seconds, so that all ranks hold the same requests.
    """

    def __init__(self) -> None:
        self._computed = self._hit = self._missed = 0.0
        self._tokens = self._held = 0
        self._by_prefix = self._holding = False

    def begin_round(self, *, by_prefix: bool) -> bool:
        """``by_prefix``: the longest cached prefix goes first in this round. Whether somebody had
        to wait who need not any more, so that it is worth asking again."""
        self._computed += (self._tokens - self._computed) / STEPS
        self._tokens = 0
        self._by_prefix = by_prefix
        self._held += self._holding
        released = self._holding and (
            not by_prefix or self._held >= MOST_HELD or self._computed < IDLE_TOKENS
        )
        self._holding = self._holding and not released
        return released

    def note_tokens(self, tokens: int) -> None:
        """So many of a prompt are computed in this round."""
        self._tokens += tokens

    def note_admitted(self, hit: int, missed: int) -> None:
        self._hit += (hit - self._hit) / STEPS
        self._missed += (missed - self._missed) / STEPS
        if missed > hit:
            self._held, self._holding = 0, False

    def waits(self, hit: int, missed: int) -> bool:
        """Whether a request for which there is memory is not to evict anything for it."""
        waits = missed > hit and self._holds
        self._holding = self._holding or waits
        return waits

    @property
    def _holds(self) -> bool:
        return (
            self._by_prefix
            and self._computed >= BUSY_TOKENS
            and self._hit >= self._missed
            and self._held < MOST_HELD
        )
