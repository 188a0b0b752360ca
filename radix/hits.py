"""The joint hit: the longest prefix that every group accepts, found by a falling fixed point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from sglang_jenga.radix.node import Miss, Node
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range


def joint_hit(
    path: Sequence[Node],
    end: int,
    policies: Sequence[LayerPolicy],
    others: Sequence[int],
    tokens_per_page: int,
) -> tuple[int, tuple[Miss, ...]]:
    """Longest length, at most ``end``, that is a hit in every group; and what cut it.

    ``path``: the nodes from the root that hold ``[0, end)``. The prefix-closed group has all of
    them by the trees' invariant, so only the ``others`` are asked. The length only falls, and each
    group is asked again after another one has cut it. So what is left satisfies all of them.
    """
    misses: list[Miss] = []
    if not others:
        return end, ()
    turns, content = cycle(others), 0
    while end and content < len(others):
        group_id = next(turns)
        policy = policies[group_id]
        cached = cached_ranges(path, end, group_id, per_prefix=policy.per_prefix)
        length = policy.get_possible_prefix(Prefix(end), cached)
        length -= length % tokens_per_page
        content += 1
        if length < end:
            lost = _last_hole(path, policy, Prefix(end), group_id)
            misses.append(Miss(group_id, end, length, lost))
            end, content = length, 0
    return end, tuple(misses)


def cached_ranges(
    path: Sequence[Node], end: int, group_id: int, *, per_prefix: bool
) -> Iterator[Range]:
    """What a group has of ``[0, end)``, longest first, whole stretches."""
    stretch: Range | None = None
    for node in reversed(path):
        if node.begin >= end or node.extents[group_id] is None:
            continue
        if per_prefix:
            if node.end <= end:
                yield node.end - 1, node.end
            continue
        part = (node.begin, min(node.end, end))
        if stretch is not None and part[1] < stretch[0]:
            yield stretch
            stretch = part
        else:
            stretch = part if stretch is None else (part[0], stretch[1])
    if stretch is not None:
        yield stretch


def _last_hole(path: Sequence[Node], policy: LayerPolicy, prefix: Prefix, group_id: int) -> Range:
    """The last stretch that the group needs for a prefix and does not have."""
    cached = list(cached_ranges(path, prefix.length, group_id, per_prefix=policy.per_prefix))
    for begin, end in reversed(policy.update_last_access(prefix)):
        at = end
        for low, high in cached:
            if high < at:
                return max(begin, high), at
            at = min(at, low)
            if at <= begin:
                break
        else:
            if at > begin:
                return begin, at
    return prefix.length, prefix.length
