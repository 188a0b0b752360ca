"""A request that is alone on its server is answered in full, or refused because it cannot fit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import currently_in_test_context, given, note

from sglang_jenga.testing.context import Settings
from tests.faces.examples import examples
from tests.faces.lone import REQUESTS, Lone, Server, serve, servers
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

FIRST = Lone(0, short=0, max_new=1)


class Way(NamedTuple):
    """A kind of model, and how it is served."""

    kind: str
    strategy: str = ""
    radix: bool = True

    def __str__(self) -> str:
        parts = [self.kind, self.strategy, "" if self.radix else "without radix cache"]
        return " ".join(part for part in parts if part)


def case(name: str, way: Way, shape: Shape, requests: list[Lone], **settings) -> Case:
    """The radix cache, overlap and the strategy follow from the way."""
    settings.setdefault("overlap", way.strategy != "no_buffer")
    full = Settings(
        radix=way.radix,
        strategy=way.strategy or "no_buffer",
        track_interval=max(8, settings.get("page_size", 1)),
        **{"chunk": None, **settings},
    )
    return Case(name, way, Server(shape._replace(num_rows=2, context=1024), full), requests)


class Case(NamedTuple):
    name: str
    way: Way
    server: Server
    requests: list[Lone]


DENSE, DENSE_UNCACHED = Way("dense"), Way("dense", radix=False)
WINDOWS, WINDOWS_UNCACHED = Way("windows"), Way("windows", radix=False)
SINKS, SINKS_UNCACHED = Way("sinks"), Way("sinks", radix=False)
NO_BUFFER, BUFFER, LAZY = (
    Way("states", strategy) for strategy in ("no_buffer", "extra_buffer", "extra_buffer_lazy")
)
STATES_UNCACHED = Way("states", radix=False)
THREE_NO_BUFFER, THREE_BUFFER, THREE_LAZY = (
    Way("three-way", strategy) for strategy in ("no_buffer", "extra_buffer", "extra_buffer_lazy")
)
THREE_UNCACHED = Way("three-way", radix=False)
WAYS = [DENSE, DENSE_UNCACHED, WINDOWS, WINDOWS_UNCACHED, NO_BUFFER, BUFFER, LAZY, STATES_UNCACHED]
WAYS += [SINKS, SINKS_UNCACHED, THREE_NO_BUFFER, THREE_BUFFER, THREE_LAZY, THREE_UNCACHED]

KNOWN = [
    # SGLang's own allocator and budget accept and starve these two as well.
    case(
        "a prompt that leaves no page for its answer",
        DENSE,
        Shape(full=1, num_large=4),
        [Lone(0, short=7, max_new=1)],
        page_size=16,
    ),
    case(
        "an answer of known length to the last token, and no radix cache",
        DENSE_UNCACHED,
        Shape(full=1, num_large=25),
        [Lone(0, short=7, max_new=8)],
    ),
    case(
        "another window is wanted beside the one that is held",
        WINDOWS,
        Shape(full=1, window_k=1, window=4, num_large=30),
        [Lone(0, short=7, max_new=8)],
        chunk=8,
    ),
    case(
        "the prompt's own cached windows stand in its way",
        WINDOWS,
        Shape(full=1, window_k=1, window=4, num_large=30),
        [FIRST, Lone(0, short=7, max_new=2)],
        chunk=8,
    ),
    case(
        "a whole chunk of windows is wanted",
        WINDOWS_UNCACHED,
        Shape(full=1, window_k=1, window=2, num_large=28),
        [Lone(0, short=7, max_new=1)],
        chunk=8,
    ),
    case(
        "its own cached state stands in the way of a prompt",
        NO_BUFFER,
        Shape(full=2, state_k=1, num_large=16),
        [FIRST, Lone(0, short=7, max_new=8)],
    ),
    case(
        "one state is counted where three are wanted",
        BUFFER,
        Shape(full=1, state_k=1, num_large=6),
        [FIRST],
        page_size=16,
    ),
    case(
        "its own cached state stands in the way of a tracked prompt",
        BUFFER,
        Shape(full=1, state_k=1, num_large=28),
        [FIRST, Lone(0, short=7, max_new=8)],
    ),
    case(
        "one state is counted where two are wanted",
        LAZY,
        Shape(full=2, state_k=1, num_large=16),
        [Lone(0, short=7, max_new=8)],
    ),
    case(
        "its own cached state stands in the way of a lazily tracked prompt",
        LAZY,
        Shape(full=2, state_k=1, num_large=7),
        [FIRST, Lone(0, short=7, max_new=1)],
        page_size=4,
    ),
    case(
        "another window is wanted beside a state",
        THREE_NO_BUFFER,
        Shape(full=1, window_k=1, window=4, state_k=1, num_large=32),
        [Lone(0, short=7, max_new=8)],
        chunk=8,
    ),
    case(
        "cached windows and states stand in the prompt's way",
        THREE_NO_BUFFER,
        Shape(full=1, window_k=1, window=11, state_k=1, num_large=39),
        [FIRST, Lone(0, short=7, max_new=1)],
    ),
    case(
        "one state is counted beside windows where three are wanted",
        THREE_BUFFER,
        Shape(full=1, window_k=1, window=2, state_k=1, num_large=8),
        [FIRST],
        page_size=16,
    ),
    case(
        "one state is counted beside windows where two are wanted",
        THREE_LAZY,
        Shape(full=7, window_k=1, window=2, state_k=1, num_large=6),
        [FIRST],
        page_size=4,
    ),
    case(
        "a whole chunk of windows is wanted beside a state",
        THREE_UNCACHED,
        Shape(full=1, window_k=1, window=2, state_k=1, num_large=30),
        [Lone(0, short=7, max_new=1)],
        chunk=8,
    ),
    case(
        "an answer that was promised is aborted",
        THREE_LAZY,
        Shape(full=2, window_k=6, window=20, state_k=1, num_large=30),
        [Lone(0, short=41, max_new=20)],
        page_size=4,
        chunk=32,
    ),
]


def serve_all(server: Server, requests: list[Lone]) -> None:
    with server.rig() as rig:
        longest = rig.pools.longest
        if currently_in_test_context():
            lengths = [len(request.prompt(longest)) for request in requests]
            note(f"prompts of {lengths} tokens, the pool's longest request has {longest}")
        for request in requests:
            serve(rig, request)


@pytest.mark.parametrize("known", KNOWN, ids=[found.name for found in KNOWN])
def test_a_lone_request_is_answered_though(known: Case):
    serve_all(known.server, known.requests)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_lone_request_is_answered_or_would_not_have_fit(way: Way):
    @examples(0.3)
    @given(servers(way.kind, way.strategy, radix=way.radix), REQUESTS)
    def holds(server, requests):
        serve_all(server, requests)

    holds()


@pytest.mark.parametrize("mixed_chunk", [False, True])
@pytest.mark.parametrize("prompt", [49, 55, 61, 65, 69])
def test_its_first_decode_step_fits_while_its_last_chunk_is_still_read(
    prompt: int, mixed_chunk: bool
):
    pool = Shape(full=12, window_k=2, window=24, state_k=1, num_large=24)
    settings = Settings(chunk=8, strategy="extra_buffer_lazy", mixed_chunk=mixed_chunk)
    with Rig(pool, settings._replace(track_interval=8, state_chunk=8)) as rig:
        ended = rig.ask(answer([1], prompt), 2)
        assert (ended.reason, ended.retractions) == ("length", 0)
