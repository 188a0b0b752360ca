"""When pages were of use, and so what goes first: the recency of the nodes on `Paths`.

Called by `RadixTrees` when a hit, an insert or an eviction has changed what is of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sglang_jenga.radix.node import AnyOwner, Extent, Node
from sglang_jenga.radix.paths import Paths, upwards
from sglang_jenga.radix.policy import Range
from sglang_jenga.radix.queues import EvictionQueues
from sglang_jenga.radix.times import Times

WORTH = 2
"""What a state has to save to be worth another request, in tokens that fit in its bytes.

Of R running requests n have a prefix of s tokens in common, so of those that come n / R will; the
state saves each of them s of the P tokens that a request computes. That is n * s / (R * P) of the
share f of its time that the server spends on prompts. The bytes of c tokens are those of c / L of
the R requests, of L tokens each, and so many fewer would cost about c / (L * R) of the other time,
1 - f. Where L is about P the state is worth more if n * s >= c * (1 - f) / f: twice its tokens at a
third of the time on prompts.
"""


class AgeingOptions(NamedTuple):
    """As in `RadixTrees`."""

    resume_points: bool
    shield: bool
    state_cost_tokens: int
    grace_tokens: int


class Ageing:
    """Keeps the times and resume points of the nodes on `Paths`, and says which pages are shielded.

    Running requests may have locked the full pages before a resume point while nobody has locked
    its window, or its state. Those full pages serve the next request only if the window is there,
    and a window is a few bytes: it is shielded. A state is not so cheap: another request could run
    in its bytes. It is shielded where many run on it, so that more come, or where it saves them a
    long prompt. For every node and group g that is not prefix-closed:

        extents[g].shielded == resume_point[g] and not locks[g] and locks[c] * end >= least[g]

    c is the prefix-closed group, whose pages every prefix needs; least[g] is 1 for a window, so
    that any lock does, and `WORTH` times the tokens that fit in its bytes for a state.
    """

    def __init__(
        self,
        paths: Paths,
        queues: EvictionQueues,
        times: Times,
        owner: AnyOwner,
        options: AgeingOptions,
    ) -> None:
        self._paths, self._queues, self._times, self._owner = paths, queues, times, owner
        self._state_cost_tokens = options.state_cost_tokens
        self._grace_tokens = options.grace_tokens
        self._closed = paths.closed
        self._others = [g for g in range(len(paths.policies)) if g not in paths.bases]
        # Groups whose pages are of no use behind a hit that went past them.
        aging = [g for g in self._others if paths.policies[g].ages_behind_hits]
        self._passed = tuple(aging if options.resume_points else ())
        self.prefix_groups = [g for g in self._others if paths.policies[g].per_prefix]
        # Per group what locks times tokens have to come to; groups that are never shielded lack.
        self._least: dict[int, int] = {}
        if options.shield:
            self._least.update(dict.fromkeys(self._passed, 1))
            if cost := options.state_cost_tokens:
                self._least.update(dict.fromkeys(self.prefix_groups, WORTH * cost))
        self.counts_locks = any(least > 1 for least in self._least.values())

    def tick(self) -> None:
        """Something happens that makes pages of use."""
        self._times.now += 1

    # ---- of use -----------------------------------------------------------------------------

    def touch(self, node: Node, *, hit: bool) -> None:
        """Refresh what each group reads of the prefix that ends at ``node``, and the resume points
        before it. The rest of the path ages; a hit also demotes what lies behind windows."""
        refresh = self._times.refresh
        paths = self._paths
        ranges = [(group_id, paths.ranges_kept(group_id, node.end)) for group_id in self._others]
        for group_id, own in ranges[:-1]:  # all cuts first: a node keeps only its back
            paths.parts_read(node, own, group_id)
        read = [(group_id, set(paths.parts_read(node, own, group_id))) for group_id, own in ranges]
        for part in upwards(node, 0):
            if (extent := part.extents[part.base]) is not None:  # it reads them all
                refresh(part, extent)
            for group_id, parts in read:
                if (extent := part.extents[group_id]) is None:
                    continue
                if part.resume_point[group_id] or part in parts:
                    refresh(part, extent)
                elif hit and group_id in self._passed:
                    self.demote(part, extent)

    def mark_resume_points(self, node: Node) -> None:
        """Called when a key is complete up to ``node``. Later requests resume at ``node``, at a
        fork above it, or a little before ``node`` (a second question on one document). Pages that
        are read at the first two places are resume points, and every visitor refreshes them. The
        ``grace_tokens`` before ``node`` become as young as they are: older, those of all documents
        would go before one document does, and none could be asked a second question. All other
        window pages of the path are demoted: the windows of its middle, of earlier ends, and of
        where a prompt was cut.

        A state is refreshed only by the request that resumes from it. Without the forks a prefix in
        daily use would lose the windows with which its users begin.
        """
        if not self._passed:
            return  # full attention reads it all: no path to walk for it
        paths = self._paths
        forks = [above.end for above in upwards(node, 0) if above.parts]
        for group_id in self._passed:
            last = paths.ranges_kept(group_id, node.end)
            before = self._before(last)
            ranges = [*last, *(r for end in forks for r in paths.ranges_kept(group_id, end))]
            paths.parts_read(node, before, group_id)  # all cuts first: a node keeps only its back
            kept = set(paths.parts_read(node, _joined(ranges), group_id))
            grace_tokens = set(paths.parts_read(node, before, group_id))
            for part in upwards(node, 0):
                part.resume_point[group_id] = part in kept
                if (extent := part.extents[group_id]) is None:
                    continue
                self._reshield(part, extent)
                if part in kept or part in grace_tokens:
                    self._times.refresh(part, extent)
                else:
                    self.demote(part, extent)

    def _before(self, last: Sequence[Range]) -> list[Range]:
        """The ``grace_tokens`` tokens before those that are read at a path's end."""
        if not last:
            return []
        step, behind = self._paths.tokens_per_page, last[0][0]
        count = self._grace_tokens
        return [(max(0, behind - count - -count % step), behind)] if behind else []

    def demote(self, node: Node, extent: Extent) -> None:
        """The node's pages of one group go before all that are of use, unless they do already."""
        if extent.shielded or self._times.is_demoted(extent):
            return
        self._times.demote(node, extent)
        if not extent.pinned:  # else it gets its entry when it is unlocked
            self._queues.push(node, extent)

    # ---- shield -----------------------------------------------------------------------------

    def reshield(self, node: Node) -> None:
        """Locks of the node have come or gone, or it has become a resume point."""
        for group_id in self._least:
            if (extent := node.extents[group_id]) is not None:
                self._reshield(node, extent)

    def _reshield(self, node: Node, extent: Extent) -> None:
        if extent.pinned:
            return
        wanted = self.is_shielded(node, extent.group_id)
        if wanted != extent.shielded:
            self._owner.shield(extent, wanted)
            self._times.shield(extent, wanted)
            if not wanted:
                self._queues.push(node, extent)

    def is_shielded(self, node: Node, group_id: int) -> bool:
        """Whether the node's pages of a group have to be shielded, if nobody has locked them."""
        least = self._least.get(group_id)
        return (
            least is not None
            and node.resume_point[group_id]
            and not node.locks[group_id]
            and node.locks[self._closed] * node.end >= least
        )

    # ---- one page per prefix ----------------------------------------------------------------

    def demote_cheap_states(self, node: Node, group_id: int) -> None:
        """``node`` has just received its state. The previous state on this path now helps only
        requests that branch off between the two, and saves them the distance to the state before
        it. If that is fewer than ``state_cost_tokens`` tokens, and nobody has branched there, it is
        demoted."""
        last = node.parent
        while last is not None:
            if self._is_branch(last, group_id):
                return
            if (state := last.extents[group_id]) is not None:
                break
            last = last.parent
        else:
            return
        before = last.parent
        while before is not None and (
            (extent := before.extents[group_id]) is None
            or self._times.is_demoted(extent)  # goes first itself
        ):
            before = before.parent
        if last.end - (0 if before is None else before.end) < self._state_cost_tokens:
            self.demote(last, state)

    @staticmethod
    def _is_branch(node: Node, group_id: int) -> bool:
        """Whether requests part here, or a page came for a prefix that others had gone on from."""
        return node.parts or node.resume_point[group_id]

    def demote_unreachable(self, node: Node) -> None:
        """With states, a token page can be hit only if a state lies at or behind its end. When the
        last such state is gone, the token pages are demoted. They stay in the tree: a request that
        comes this way still learns where it branches off."""
        if not self.prefix_groups:
            return
        times, closed = self._times, self._closed
        while (
            (above := node.parent) is not None
            and all(node.extents[group_id] is None for group_id in self.prefix_groups)
            and all(
                (own := child.extents[closed]) is None or times.is_demoted(own)
                for child in node.children.values()
            )
        ):
            for group_id, extent in enumerate(node.extents):
                if extent is not None and not self._paths.policies[group_id].per_prefix:
                    self.demote(node, extent)
            node = above


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The same tokens in disjoint ranges, rising."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
