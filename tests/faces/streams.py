"""Streams that only remember: what is queued on which, and behind what.

Work runs on the host at once. What a card would be bound to is read from `Work.behind`: everything
that was on the stream before it, or that the stream was made to wait for. Two works of which
neither is behind the other may run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Work(NamedTuple):
    name: str
    stream: str
    behind: frozenset[int]  # places in `Streams.queued`


class Event:
    """As torch's: what a stream had to do when it was recorded."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.seen = set(stream.seen)

    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen


class Streams:
    """Torch's module of a device, as far as a scheduler calls it."""

    def __init__(self) -> None:
        self.schedule, self.forward = Stream("schedule"), Stream("forward")
        self.queued: list[Work] = []
        self._current = [self.schedule]

    def Event(self) -> Event:
        event, record = Event(), Event.record
        event.record = lambda stream=None: record(event, stream or self.current_stream())
        return event

    def current_stream(self) -> Stream:
        return self._current[-1]

    def stream(self, stream: Stream) -> _Current:
        return _Current(self._current, stream)

    def queue(self, name: str) -> None:
        """Put work on the current stream."""
        stream = self.current_stream()
        self.queued.append(Work(name, stream.name, frozenset(stream.seen)))
        stream.seen.add(len(self.queued) - 1)

    def places(self, name: str) -> list[int]:
        return [place for place, work in enumerate(self.queued) if work.name == name]

    def loose(self, name: str, other: str) -> Iterator[tuple[int, int]]:
        """Pairs of two kinds of work, in the order of their queueing, that nothing holds apart."""
        for place in self.places(name):
            for before in self.places(other):
                first, second = sorted((place, before))
                if first not in self.queued[second].behind:
                    yield first, second


class _Current:
    """Reusable, as torch's: SGLang enters one context for every forward."""

    def __init__(self, stack: list[Stream], stream: Stream) -> None:
        self._stack, self._stream = stack, stream

    def __enter__(self) -> None:
        self._stack.append(self._stream)

    def __exit__(self, *_: object) -> None:
        self._stack.pop()


@contextmanager
def recorded(streams: Streams, owner: object, attribute: str, name: str) -> Iterator[None]:
    """Inside, calls of a method are work of that name on the stream that is current."""
    work = getattr(owner, attribute)

    def recording(*args, **kwargs):
        streams.queue(name)
        return work(*args, **kwargs)

    setattr(owner, attribute, recording)
    try:
        yield
    finally:
        setattr(owner, attribute, work)
