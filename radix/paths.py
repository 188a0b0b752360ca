"""The skeleton of keys that all layer groups' trees share: finding, cutting and climbing nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from sglang_jenga.radix.node import NO_PAGES, AnyOwner, Node, Run, TreeObserver
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, closed_group, image_group
from sglang_jenga.radix.queues import EvictionQueues
from sglang_jenga.radix.times import Times


class Paths:
    """The nodes below ``root``. For every node but the root:

        parent.end == begin < end           both multiples of tokens_per_page
        parent.children[edge] is the node

    Splitting and joining nodes splits and joins their extents, and keeps the queues' entries true.
    """

    def __init__(
        self,
        policies: Sequence[LayerPolicy],
        tokens_per_page: int,
        owner: AnyOwner,
        queues: EvictionQueues,
        times: Times,
        observer: TreeObserver | None,
    ) -> None:
        self.policies = policies
        # A node exactly while this group has its pages, or, for an image, the other one.
        self.closed = closed_group(policies)
        self.image = image_group(policies)
        self.bases = (self.closed,) if self.image is None else (self.closed, self.image)
        self.tokens_per_page = tokens_per_page
        self._grains = [
            max(1, policy.grain // tokens_per_page) * tokens_per_page for policy in policies
        ]
        self.root = Node(None, None, None, Run(NO_PAGES, 0), 0, 0, len(policies))
        self._owner = owner
        self._queues, self._times = queues, times
        self._observer = observer

    def base_at(self, position: int, image_ends: Sequence[int]) -> int:
        """The base of a node that begins there, in a key whose images end at ``image_ends``."""
        if self.image is None or position >= text_begin(image_ends):
            return self.closed
        return self.image

    def leads_into(self, child: Node, agreed: int, image_ends: Sequence[int] | None) -> bool:
        """Whether a key that agrees with a child up to ``agreed`` has part in it. An image counts
        as a whole; ``image_ends``: where the key's images end, None if nobody knows."""
        if self.image is None:
            return True
        if child.base == self.image:
            whole = agreed >= child.end
            return whole and (image_ends is None or child.end == _end_behind(child, image_ends))
        return image_ends is None or child.begin >= text_begin(image_ends)

    def walk(
        self, namespace: Hashable, key: np.ndarray, image_ends: Sequence[int] | None = ()
    ) -> tuple[list[Node], int]:
        """Nodes along ``key`` and the page-aligned length up to which their keys agree, of images
        whole ones; ``image_ends`` as in `leads_into`."""
        node, at = self.root, 0
        path: list[Node] = []
        run, agreed = None, 0
        while at + self.tokens_per_page <= key.size:
            child = node.children.get(self.edge(namespace, key, at))
            if child is None:
                break
            if child.run is not run:  # else compared already, with the nodes before
                run = child.run
                agreed = at + common(run.tokens[at - run.begin :], key[at:])
            if self.image is not None and not self.leads_into(child, agreed, image_ends):
                break
            path.append(child)
            at = min(child.end, agreed - agreed % self.tokens_per_page)
            if at < child.end:
                break
            node = child
        return path, at

    def edge(self, namespace: Hashable, key: np.ndarray, at: int) -> Hashable:
        """Key of a child: its first small page, under the root with the namespace."""
        if self.tokens_per_page == 1:
            first: Hashable = int(key[at])
        else:
            first = key[at : at + self.tokens_per_page].tobytes()
        return first if at else (namespace, first)

    def agreement(self, node: Node, key: np.ndarray, at: int) -> int:
        """Tokens, in whole small pages, that a node shares with ``key[at:]``."""
        same = common(node.key, key[at:])
        return same - same % self.tokens_per_page

    def split(self, node: Node, at: int) -> Node:
        """Cut a node in two at token ``at``; the back stays this object. Returns the new front."""
        assert node.parent is not None and node.begin < at < node.end
        assert node.base != self.image, "an image is not split"
        index = at - node.begin
        assert index % self.tokens_per_page == 0
        front = Node(
            node.parent,
            node.edge,
            node.namespace,
            node.run,
            node.begin,
            at,
            len(self.policies),
            node.base,
        )
        front.resume_point = list(node.resume_point)
        node.parent.children[front.edge] = front
        node.begin, node.parent = at, front
        node.edge = self.edge(None, node.run.tokens, at - node.run.begin)
        front.children[node.edge] = node
        for group_id, extent in enumerate(node.extents):
            if self.policies[group_id].per_prefix:
                front.resume_point[group_id] = False
                continue  # the page and its locks are those of the whole prefix
            front.locks[group_id] = node.locks[group_id]
            if extent is not None:
                first, last = self._owner.split(extent, index // self.tokens_per_page)
                front.extents[group_id], first.node = first, front
                node.extents[group_id], last.node = last, node
                self._times.inherit(front, first, last)
                if not front.locks[group_id]:
                    self._queues.push(front, first)
        if self._observer is not None:
            self._observer.split(front, node)
        return front

    def join(self, node: Node) -> None:
        """Undo splits on the path to ``node`` whose sides nothing tells apart any more.

        Evictions and locks cut nodes, and every later walk has to look at each piece. Without ranks
        (`Times.aligned`) nothing is joined: there the parts of a path go in the order in which they
        came.
        """
        if not self._times.aligned:
            return
        while (front := node.parent) is not None and (above := front.parent) is not None:
            if not self._alike(front, node):
                node = front
                continue
            for group_id, (first, last) in enumerate(zip(front.extents, node.extents, strict=True)):
                if first is not None and last is not None:
                    self._owner.join(first, last)
                    front.extents[group_id] = None
            if front.run is not node.run:
                node.run = Run(np.concatenate([front.key, node.key]), front.begin)
            node.begin, node.edge, node.parent = front.begin, front.edge, above
            above.children[node.edge] = node
            self._queues.joined(front, node)
            if self._observer is not None:
                self._observer.joined(front, node)

    def _alike(self, front: Node, back: Node) -> bool:
        """Whether a node and its only child could be one node.

        The locks say that no request ends at the front's end: it would have locked the front alone.
        """
        if len(front.children) > 1 or front.forked or front.base == self.image:
            return False
        if front.locks[self.closed] != back.locks[self.closed]:
            return False
        for group_id, (first, last) in enumerate(zip(front.extents, back.extents, strict=True)):
            if self.policies[group_id].per_prefix:
                # The back's page and locks are those of the whole prefix.
                if first is not None or front.locks[group_id] or front.resume_point[group_id]:
                    return False
                continue
            if (
                front.locks[group_id] != back.locks[group_id]
                or front.resume_point[group_id] != back.resume_point[group_id]
            ):
                return False
            if first is None or last is None:
                if first is not last:
                    return False
            elif first.shielded != last.shielded or not self._times.as_old(first, last):
                return False
        return True

    def ranges_kept(
        self, group_id: int, length: int, most: int | None = None, *, exactly: bool = False
    ) -> Sequence[Range]:
        """What a group keeps of the first ``most`` of ``length`` tokens: what it reads after them,
        in whole pages and from a multiple of its grain on, or ``exactly``."""
        step = self.tokens_per_page
        grain = step if exactly else self._grains[group_id]
        ranges = self.policies[group_id].update_last_access(Prefix(length))
        if grain == 1 and most is None:
            return ranges
        most = length if most is None else most
        whole: list[Range] = []
        for begin, end in ranges:
            begin, end = begin - begin % grain, min(end + -end % step, most)
            if whole and begin < whole[-1][1]:  # two ranges end and begin in one page
                begin = whole.pop()[0]
            if begin < end:
                whole.append((begin, end))
        return whole

    def parts_read(self, node: Node, ranges: Sequence[Range], group_id: int) -> list[Node]:
        """Nodes of the path to ``node`` that hold exactly these ranges, which are in rising order;
        splits at their edges. Without those that the group has no pages of by nature: an image's,
        or, for the image's group, all others."""
        if self.policies[group_id].per_prefix:
            return [
                part for begin, end in ranges for part in upwards(node, begin) if part.end <= end
            ]
        found = []
        at = len(ranges) - 1
        while at >= 0 and (above := node.parent) is not None:
            begin, end = ranges[at]
            if node.end <= begin:
                at -= 1
            elif node.begin >= end:
                node = above
            elif node.end > end:
                node = self.split(node, end)
            else:
                if node.begin < begin:
                    above = self.split(node, begin)  # it keeps its age and stays evictable
                if node.base == group_id or group_id not in self.bases:
                    found.append(node)
                node = above
        return found


def text_begin(image_ends: Sequence[int]) -> int:
    """Where the text of a key begins whose images, which come first, end there."""
    return image_ends[-1] if image_ends else 0


def _end_behind(image: Node, image_ends: Sequence[int]) -> int | None:
    """Where a key's image ends that begins with this one; None if none does."""
    return next((end for end in image_ends if end > image.begin), None)


def common(tokens: np.ndarray, others: np.ndarray) -> int:
    """How many tokens two keys have in common from their beginning on."""
    length = min(tokens.size, others.size)
    if not length:
        return 0
    differs = tokens[:length] != others[:length]
    same = int(differs.argmax())
    return same if same or differs[0] else length


def upwards(node: Node, begin: int) -> Iterator[Node]:
    """Nodes from ``node`` up that hold a position at or after ``begin``."""
    while (above := node.parent) is not None and node.end > begin:
        yield node
        node = above
