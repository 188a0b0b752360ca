"""Holds a layer type against a count by hand, for whoever writes one.

    from sglang_jenga.testing.kind_check import check_kind

    def test_my_type():
        check_kind(MyType(16), reads=lambda token: set(range(max(0, token - 15), token)))

``reads`` says once more, from the type's meaning, which tokens before it a token reads. Without it
the type's own policy is asked, which finds what does not agree and not what is wrong in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sglang_jenga.layers.base import LayerKind, Load
from sglang_jenga.radix.policy import Prefix, Range

Reads = Callable[[int], set[int]]
SMALL_PAGES = (1, 3, 4, 16)
"""Tokens of a small page with which a type is tried."""


class KindError(AssertionError):
    """A layer type's answers are wrong, or do not agree; the message says which and where."""


def check_kind(kind: LayerKind, reads: Reads | None = None, *, lengths: int | None = None) -> None:
    """Try a layer type whose pages are tokens' with requests of up to ``lengths`` tokens, or some
    more than two widths and its sinks. Takes seconds from a width of a hundred on: try short ones.

    Raises:
        KindError: the first thing that is wrong.
    """
    width = getattr(kind, "width", 12)
    most = lengths or 2 * width + min(kind.sinks, 4 * width + 64) + 8
    check = _Check(kind, most, reads or (lambda token: _policy_reads(kind, token)))
    check.policy_reads_what_a_token_reads()
    check.dead_is_what_no_later_token_reads()
    check.dead_stays_dead_and_begins_in_one_place()
    check.hits_have_what_they_read()
    check.growth_bounds_what_decoding_adds()
    for tokens_per_page in SMALL_PAGES:
        check.a_step_takes_the_pages_that_its_tokens_begin(tokens_per_page)
        check.alive_pages_are_counted(tokens_per_page)
        check.a_request_holds_no_more_than_said(tokens_per_page)


def _policy_reads(kind: LayerKind, token: int) -> set[int]:
    return _tokens(kind.policy.update_last_access(Prefix(token))) if token else set()


def _tokens(ranges: Iterable[Range | None]) -> set[int]:
    return {at for part in ranges if part is not None for at in range(*part)}


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise KindError(what)


class _Check(NamedTuple):
    kind: LayerKind
    most: int
    reads: Reads

    def _dead(self, length: int) -> set[int]:
        return _tokens([self.kind.dead(length)])

    def _say(self, what: str) -> str:
        return f"{self.kind.label}: {what}"

    def policy_reads_what_a_token_reads(self) -> None:
        for length in range(1, self.most):
            found, meant = _policy_reads(self.kind, length), self.reads(length)
            _require(
                found == meant,
                self._say(
                    f"policy.update_last_access(Prefix({length})) must be the tokens "
                    f"{sorted(meant)}, which the next one reads, got {sorted(found)}"
                ),
            )

    def dead_is_what_no_later_token_reads(self) -> None:
        """All of it may be alive, none of what is read may be dead; what is in the middle of a
        request may stay though nobody reads it, since the dead tokens are one range."""
        width = getattr(self.kind, "width", 0)
        for length in range(self.most):
            later = range(length, length + 2 * self.most + width)
            alive = {at for token in later for at in self.reads(token) if at < length}
            wrong = sorted(self._dead(length) & alive)
            _require(
                not wrong,
                self._say(f"dead({length}) has the tokens {wrong}, which later ones read"),
            )

    def dead_stays_dead_and_begins_in_one_place(self) -> None:
        before, sinks = set[int](), self.kind.sinks
        for length in range(self.most):
            dead = self._dead(length)
            _require(dead <= set(range(length)), self._say(f"dead({length}) has tokens to come"))
            _require(
                before <= dead,
                self._say(f"dead({length}) lacks {sorted(before - dead)}, dead a token before"),
            )
            _require(
                not dead or min(dead) == sinks,
                self._say(
                    f"dead({length}) begins at {min(dead, default=0)}, of long requests at {sinks}"
                ),
            )
            before = dead

    def hits_have_what_they_read(self) -> None:
        """With everything cached all is a hit, and a hit of less than all has what it reads; what
        is asked for the longest can be asked for itself."""
        policy = self.kind.policy
        for length in range(1, self.most):
            found = policy.get_possible_prefix(Prefix(length), iter([(0, length)]))
            _require(found == length, self._say(f"of {length} cached tokens {found} are a hit"))
            dead = self.kind.dead(length)
            kept = [(0, length)] if dead is None else [(dead[1], length), (0, dead[0])]
            kept = [part for part in kept if part[0] < part[1]]
            found = policy.get_possible_prefix(Prefix(length), iter(kept))
            _require(
                found == length,
                self._say(f"with only dead({length}) gone, {found} of {length} tokens are a hit"),
            )
            for cut in {1, self.kind.sinks, length // 2, length - 1} & set(range(1, length)):
                parts = [(cut + 1, length), (0, cut)]
                parts = [part for part in parts if 0 <= part[0] < part[1]]
                found = policy.get_possible_prefix(Prefix(length), iter(parts))
                lost = self.reads(found) - _tokens(parts) if found else set()
                _require(
                    0 <= found <= length and not lost,
                    self._say(
                        f"with token {cut} of {length} gone, {found} tokens are called a hit, "
                        f"and {sorted(lost)} are read that are not there"
                    ),
                )

    def growth_bounds_what_decoding_adds(self) -> None:
        alive = [length - len(self._dead(length)) for length in range(self.most)]
        for length in range(self.most):
            for tokens in range(self.most - length):
                most = max(alive[length : length + tokens + 1]) - alive[length]
                said = self.kind.growth(length, tokens)
                _require(
                    most <= said <= tokens,
                    self._say(
                        f"growth({length}, {tokens}) must be from {most} to {tokens}, got {said}"
                    ),
                )

    def a_step_takes_the_pages_that_its_tokens_begin(self, size: int) -> None:
        for start in range(0, self.most, 3):
            for end in range(start, self.most, 2):
                begun = -(-end // size) - -(-start // size)
                said = self.kind.step(start, end, size)
                _require(
                    said == begun,
                    self._say(f"step({start}, {end}, {size}) must be {begun}, got {said}"),
                )

    def alive_pages_are_counted(self, size: int) -> None:
        for length in range(self.most):
            dead = self._dead(length)
            alive = {at // size for at in range(length) if at not in dead}
            if length % size:
                alive.add(length // size)  # the next token goes there
            said = self.kind.alive_pages(length, size)
            _require(
                said == len(alive),
                self._say(f"alive_pages({length}, {size}) must be {len(alive)}, got {said}"),
            )

    def a_request_holds_no_more_than_said(self, size: int) -> None:
        """Token by token: what a hit at the last whole page reads is kept, the rest given back."""
        kind, held, before = self.kind, set[int](), 0
        for length in range(1, self.most):
            held.add((length - 1) // size)
            most = kind.held(Load(length), size)
            _require(
                len(held) <= most,
                self._say(
                    f"a request of {length} tokens holds {len(held)} pages, held says {most}"
                ),
            )
            _require(
                before <= most,
                self._say(f"held of {length} tokens is {most}, of one less {before}"),
            )
            before = most
            page, kept = length - length % size, kind.kept_behind(length, size)
            if kept is not None:
                held -= set(range(-(-kept[0] // size), kept[1] // size))
            needed = {at // size for at in self.reads(length)}
            if page:
                needed |= {at // size for at in self.reads(page)} | {page // size - 1}
            lost = sorted(needed - held)
            _require(
                not lost,
                self._say(
                    f"at {length} tokens kept_behind gives back the pages {lost} of {size} tokens, "
                    "which the next token or a hit at the last whole page reads"
                ),
            )
