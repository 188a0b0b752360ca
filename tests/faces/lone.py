"""Requests that are alone on a server: each is answered in full, or refused because it cannot fit.

What earlier ones have left in the trees is nobody's, so it may not stand in the way.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from sglang_jenga.layers.base import Address
from sglang_jenga.testing.context import Settings
from tests.faces.outside import SinkWindow
from tests.faces.pools import Pools, Shape, states_of_request
from tests.faces.rig import Ended, Rig
from tests.faces.symbols import answer

SLACK_TOKENS, SLACK_PAGES = 8, 3
"""Room that may be set aside. SGLang takes 7 tokens off the pool's longest request before it takes
a prompt, and rounds prompt, request and pool to pages separately."""


class Lone(NamedTuple):
    """A prompt ``short`` tokens shorter than the pool's longest request, one of three texts, and
    how long its answer is to be."""

    text: int
    short: int
    max_new: int
    known_length: bool = True
    cached: bool = True

    def prompt(self, longest: int) -> list[int]:
        length = max(2, longest - self.short)
        return answer([self.text], length)


class Server(NamedTuple):
    shape: Shape
    settings: Settings

    def rig(self) -> Rig:
        return Rig(self.shape, self.settings, check=False)


def would_fit(pools: Pools, settings: Settings, prompt: int, new: int) -> bool:
    """Whether the empty pool holds a request with the slack, though in each group one large page
    is filled as badly as can be, with windows two, with sinks before them three, with every state
    in a large page of its own, and windows in chunks as small as may be."""
    page_size = settings.page_size
    slack = SLACK_TOKENS + SLACK_PAGES * page_size
    tokens = prompt + new + slack
    total = 0
    for group_id, item in enumerate(pools.plan.groups):
        group, k = item.group, item.smalls_per_large
        held, badly_filled = tokens, 1
        dead = group.kind.dead(1 << 20)
        if dead is not None:
            kept, badly_filled = group.window + dead[0] + slack, 2 + (dead[0] > 0)
            held = tokens if settings.chunk is None else min(tokens, kept)
        pages = -(-held // page_size)
        if group.kind.address is Address.REQUEST:
            pages = pools.allocator.capacity.states_per_request * k
        if group_id == pools.plan.null_group:
            pages += pools.plan.null_smalls
        total += -(-(pages + badly_filled * (k - 1)) // k)
    return total <= pools.plan.num_large


def serve(rig: Rig, request: Lone) -> Ended:
    """Serve it, alone.

    Raises AssertionError if SGLang accepted it and it was not answered in full at once, or refused
    it, or cut its answer, though it would have fit; Mute if it was never run.
    """
    prompt = request.prompt(rig.pools.longest)
    how = {"known_length": request.known_length, "cached": request.cached}
    ended = rig.ask(prompt, request.max_new, **how)
    said = len(ended.tokens)
    if ended.refused:
        said = 0
    else:
        assert (ended.reason, ended.retractions) == ("length", 0), (
            f"a prompt of {len(prompt)} tokens was retracted {ended.retractions} times and ended "
            f"by {ended.reason} after {said} tokens: {ended.message}"
        )
    if said < request.max_new:
        fits = would_fit(rig.pools, rig.settings, len(prompt), said + 1)
        assert not fits, f"{len(prompt)} tokens and {said + 1} new ones would fit: {ended.message}"
    return ended


KINDS = {
    "dense": {},
    "windows": {"window_k": st.integers(1, 8), "window": st.integers(2, 40)},
    "sinks": {
        "window_k": st.integers(1, 8),
        "window": st.integers(2, 40),
        "sliding": st.just(SinkWindow.name),
    },
    "states": {"state_k": st.integers(1, 2)},
    "three-way": {
        "window_k": st.integers(1, 8),
        "window": st.integers(2, 40),
        "state_k": st.integers(1, 2),
    },
}


@st.composite
def servers(draw, kind: str, strategy: str, *, radix: bool) -> Server:
    """Servers of a kind of model whose pool holds requests of some 20 to 250 tokens."""
    page_size = draw(st.sampled_from([1] if radix and strategy == "no_buffer" else [1, 4, 16]))
    shape = Shape(**draw(st.fixed_dictionaries({"full": st.integers(1, 8), **KINDS[kind]})))
    settings = Settings(
        page_size=page_size,
        chunk=draw(st.sampled_from([None, max(8, page_size), 32])),
        radix=radix,
        strategy=strategy or "no_buffer",
        overlap=draw(st.booleans()) if not radix or strategy != "no_buffer" else False,
        track_interval=max(8, page_size),
    )
    return Server(_sized(shape, settings, draw(st.integers(24, 250))), settings)


def _sized(shape: Shape, settings: Settings, longest: int) -> Shape:
    """The smallest pool that holds a request so long."""
    from sglang_jenga.boot.geometry import longest_request

    def held(num_large: int) -> int:
        plan = shape._replace(num_large=num_large).plan(settings.page_size)
        return longest_request(plan, states_of_request(settings))

    num_large = 4
    while held(num_large) < longest:
        num_large += 1
    return shape._replace(num_large=num_large, num_rows=2, context=1024)


REQUESTS = st.lists(
    st.builds(
        Lone,
        text=st.integers(0, 2),
        short=st.one_of(st.integers(-2, 40), st.integers(0, 240)),
        max_new=st.sampled_from([1, 2, 8, 20, 64]),
        known_length=st.booleans(),
        cached=st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=3,
)
