"""KV events for cache-aware routers: what the trees store and drop, as SGLang publishes it."""

from __future__ import annotations

from array import array
from typing import Any, cast

from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import split_node_hash_value

from sglang_jenga.radix.node import Node


class _Published:
    """A node as SGLang's recorder wants it: hashes of its pages, chained to its parent's."""

    __slots__ = ("event_hash_value", "hash_value", "key", "parent")

    def __init__(self, key: RadixKey, parent: _Published | None) -> None:
        self.key, self.parent = key, parent
        self.hash_value: list[str] | None = None
        self.event_hash_value: list[str] | None = None


class EventPublisher:
    """Observes the trees. A block is published while its base group has its tokens: full attention,
    or of an image cross attention. An image's tokens are what SGLang puts in its place.

    It can be hit if the other groups still have what they need; SGLang's own trees mean the same.
    ``session_id`` is that of the request whose tokens the trees are about to take.
    """

    def __init__(self, recorder: KVCacheEventRecorder) -> None:
        self._recorder = recorder
        self.session_id: str | None = None
        self.cleared()

    def stored(self, node: Node) -> None:
        parent = self._published.get(node.parent, self._root)
        published = _Published(_key_of(node), parent)
        self._published[node] = published
        self._recorder.record_store(published, session_id=self.session_id)

    def split(self, front: Node, back: Node) -> None:
        old = self._published[back]
        first = _Published(_key_of(front), old.parent)
        page_size, length = self._recorder.page_size, front.key.size
        old.key, old.parent = _key_of(back), first
        for name in ("hash_value", "event_hash_value"):
            halves = split_node_hash_value(getattr(old, name), length, page_size)
            for part, half in zip((first, old), halves, strict=True):
                setattr(part, name, half)
        self._published[front] = first

    def joined(self, front: Node, back: Node) -> None:
        first, last = self._published.pop(front), self._published[back]
        last.key, last.parent = _key_of(back), first.parent
        for name in ("hash_value", "event_hash_value"):
            parts = getattr(first, name), getattr(last, name)
            setattr(last, name, None if None in parts else [*parts[0], *parts[1]])

    def removed(self, node: Node) -> None:
        self._recorder.record_remove(self._published.pop(node))

    def cleared(self) -> None:
        self._root = _Published(RadixKey(array("q")), None)
        self._root.hash_value = []
        self._published: dict[Any, _Published] = {}
        self._recorder.record_all_cleared()


def _key_of(node: Node) -> RadixKey:
    extra_key, cache_salt = cast("tuple[str | None, str | None]", node.namespace)
    return RadixKey(array("q", node.key.tobytes()), extra_key, cache_salt=cache_salt)
