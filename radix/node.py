"""What a radix tree is made of, whom it tells about pages, and the receipts that it hands out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from sglang_jenga.radix.policy import Range

NO_PAGES = np.zeros(0, dtype=np.int64)


class Extent(Protocol):
    """The small pages of one node in one group. Ids are opaque integers here."""

    group_id: int
    ids: np.ndarray
    number: int  # stands for the extent in arrays
    pinned: bool
    shielded: bool
    node: Node  # for the trees to set

    @property
    def size(self) -> int: ...
    @property
    def num_large(self) -> float: ...


_Pages = TypeVar("_Pages", bound=Extent)


class PageOwner(Protocol[_Pages]):
    """Told about every change of a page's state, and asked which large page can be emptied when.

    The allocator implements it, for extents of its own. ``times[extent.number]`` are those of
    `radix.times.Times`.
    """

    @property
    def num_empty_larges(self) -> int: ...
    def adopt(self, group_id: int, small_ids: np.ndarray) -> _Pages: ...
    def split(self, extent: _Pages, index: int) -> tuple[_Pages, _Pages]: ...
    def join(self, front: _Pages, back: _Pages) -> None: ...
    def pin(self, extent: _Pages) -> None: ...
    def unpin(self, extent: _Pages) -> None: ...
    def shield(self, extent: _Pages, shielded: bool) -> None: ...
    def evict(self, extent: _Pages) -> None: ...
    def turn(self, extent: _Pages, times: np.ndarray) -> int | None: ...
    def due(self, extent: _Pages, times: np.ndarray, time: int) -> np.ndarray: ...
    def sharing(self, extent: _Pages, large_ids: np.ndarray) -> list[_Pages]: ...
    def first_in(self, extent: _Pages, large_ids: np.ndarray) -> int: ...
    def take_woken(self, times: np.ndarray) -> list[_Pages]: ...


AnyOwner = PageOwner[Any]  # it gets no extents but those that it has made


class Run:
    """The tokens, from position ``begin`` on, that neighbouring nodes were made of. One comparison
    with a key serves all of these nodes."""

    __slots__ = ("begin", "tokens")

    def __init__(self, tokens: np.ndarray, begin: int) -> None:
        self.tokens, self.begin = tokens, begin


class Node:
    """The tokens ``[begin, end)`` of every path that runs through it.

    ``base`` is the group without whose pages the node does not exist: the prefix-closed one, or, of
    an image, the atomic one. For every group g:

        extents[g]       one small page per ``tokens_per_page`` tokens; in a group with one page per
                         prefix, the page of the prefix that ends here; None for a hole
        locks[g]         number of running requests that need it
        resume_point[g]  later requests resume where it is read; in a group with one page per
                         prefix, requests part right here
        in_smalls[g], in_larges[g]
                         times of its entries in the group's two eviction queues; None for no entry

    ``forked``: requests have parted at its end.
    """

    __slots__ = (
        "base",
        "begin",
        "children",
        "edge",
        "end",
        "extents",
        "forked",
        "in_larges",
        "in_smalls",
        "locks",
        "namespace",
        "parent",
        "resume_point",
        "run",
    )

    def __init__(
        self,
        parent: Node | None,
        edge: Hashable,
        namespace: Hashable,
        run: Run,
        begin: int,
        end: int,
        num_groups: int,
        base: int = 0,
    ) -> None:
        self.base = base
        self.parent = parent
        self.edge = edge  # parent.children[edge] is this node
        self.namespace = namespace
        self.run = run
        self.begin = begin
        self.end = end
        self.children: dict[Hashable, Node] = {}
        self.extents: list[Extent | None] = [None] * num_groups
        self.locks = [0] * num_groups
        self.resume_point = [False] * num_groups
        self.in_smalls: list[int | None] = [None] * num_groups
        self.in_larges: list[int | None] = [None] * num_groups
        self.forked = False

    @property
    def key(self) -> np.ndarray:
        """Its tokens, int64; a view."""
        first = self.run.begin
        return self.run.tokens[self.begin - first : self.end - first]

    def evictable(self, group_id: int) -> Extent | None:
        """Its pages of a group if eviction may take them."""
        return None if self.locks[group_id] else self.extents[group_id]

    @property
    def parts(self) -> bool:
        """Whether requests part at its end, or did before all but one way was evicted."""
        return self.forked or len(self.children) > 1


class TreeObserver(Protocol):
    """Told how the tree of keys changes, for those who publish what is cached."""

    def stored(self, node: Node) -> None: ...
    def split(self, front: Node, back: Node) -> None: ...
    def joined(self, front: Node, back: Node) -> None: ...
    def removed(self, node: Node) -> None: ...
    def cleared(self) -> None: ...


class PageObserver(Protocol):
    """Told when a node that stays gets or loses its pages of any group but the prefix-closed."""

    def changed(self, node: Node, group_id: int) -> None: ...


NO_TOKENS: Range = (0, 0)


class TokenPages(NamedTuple):
    """A request's own pages of the tokens from ``begin`` on, one per ``tokens_per_page``; where the
    ``ids`` end before the key, those tokens are another group's. It has none of the tokens ``gone``
    (whole pages) any more; what ``ids`` says of those means nothing."""

    begin: int
    ids: np.ndarray
    gone: Range = NO_TOKENS


PrefixPages = Mapping[int, int]  # length of a prefix: the request's own page for it


class PathLock(NamedTuple):
    """Receipt of a lock: for group g the path to ``node`` is locked in the token ``ranges[g]``."""

    node: Node
    ranges: tuple[tuple[Range, ...], ...]


class Miss(NamedTuple):
    """Group ``group_id`` cut a hit from ``before`` to ``after`` tokens, for want of ``lost``."""

    group_id: int
    before: int
    after: int
    lost: Range


class Match(NamedTuple):
    """``node`` ends the longest joint hit; ``misses`` says what made it shorter than the keys'
    agreement of ``agreed`` tokens."""

    node: Node
    agreed: int
    misses: tuple[Miss, ...]


class Inserted(NamedTuple):
    """``node`` ends the key, or what of it the trees have: they keep no key that parts from theirs
    inside an image. ``declined[g]``: small ids of group g, up to there, that the trees did not
    take, because they had pages there already."""

    node: Node
    declined: list[list[np.ndarray]]
