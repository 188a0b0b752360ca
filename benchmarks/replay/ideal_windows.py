"""Which tokens of a tree's nodes are in somebody's window: a union, each token counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.replay.ideal_tree import Tree


class Windows:
    """Whoever needs tokens of a node needs all from some position on to the node's last one.

    Args:
        present: per node, its leading tokens that count at all; the caller may change it in place,
            and calls `recount` then.
    """

    def __init__(self, tree: Tree, present: Sequence[int]) -> None:
        self._begin, self._end, self._present = tree.begin, tree.end, present
        self._lows: list[dict[int, int]] = [{} for _ in tree.begin]
        self._counted = [0 for _ in tree.begin]
        self.tokens = 0

    def need(self, who: int, path: Iterable[int], low: int) -> None:
        """`who` needs what lies from position `low` on of this path's nodes, the last one first."""
        for node in path:
            if self._end[node] <= low:
                break
            self._lows[node][who] = low
            self.recount(node)

    def forget(self, who: int, path: Iterable[int], above: int) -> None:
        """`who` needs nothing more of these nodes, the last one first, down to position `above`."""
        for node in path:
            if self._end[node] <= above:
                break
            if self._lows[node].pop(who, None) is not None:
                self.recount(node)

    def recount(self, node: int) -> None:
        lows = self._lows[node]
        tokens = self._tokens(node, min(lows.values())) if lows else 0
        self.tokens += tokens - self._counted[node]
        self._counted[node] = tokens

    def more(self, path: Iterable[int], low: int) -> int:
        """Tokens by which ``need(.., path, low)`` would let the union grow."""
        added = 0
        for node in path:
            if self._end[node] <= low:
                break
            added += max(0, self._tokens(node, low) - self._counted[node])
        return added

    def _tokens(self, node: int, low: int) -> int:
        return max(0, self._present[node] - max(0, low - self._begin[node]))
