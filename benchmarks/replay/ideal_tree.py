"""All prompts and answers of a workload in one radix tree, before anything is played.

A node is a run of tokens that no request leaves in the middle; who shares what with whom is read
off the paths. An answer's last token is in no path: its KV is never computed. A tree knows no model
and no server, and is built once per workload.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.replay.requests import Request


class Tree:
    """Nodes are numbered, ids of requests are their places in the workload.

    Attributes:
        parent, begin, end: of each node; positions in tokens, ``[begin, end)``. -1: no parent.
        paths: per request, the nodes from its first token to its last computed one.
        prompts: per request, tokens of its prompt.
        resumable: per request, how many leading nodes of its path end early enough to be gone on
            from: a prompt's last token is always computed, because its output is wanted.
        targets: per request, the last of these nodes that one listed before it goes through, which
            is where it resumes if everything is kept; -1: none.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.parent: list[int] = []
        self.begin: list[int] = []
        self.end: list[int] = []
        self._keys: list[np.ndarray] = []
        self._children: list[dict[int, int]] = []
        self._roots: dict[int, int] = {}
        self.prompts = [int(request.prompt.size) for request in requests]
        full = [np.concatenate([request.prompt, request.output[:-1]]) for request in requests]
        for tokens in full:
            self._insert(tokens)
        self._first = self._first_visitors([self._path(tokens) for tokens in full])
        for request, tokens in enumerate(full):
            self._cut(tokens, self.prompts[request] - 1, request)
        self.paths = [self._path(tokens) for tokens in full]
        self.resumable = [
            sum(self.end[node] < prompt for node in path)
            for path, prompt in zip(self.paths, self.prompts, strict=True)
        ]
        self._first = self._first_visitors(self.paths)
        self.targets = [
            max(
                (node for node in path[:most] if self._first[node] < request),
                key=self._at,
                default=-1,
            )
            for request, (path, most) in enumerate(zip(self.paths, self.resumable, strict=True))
        ]
        self._keys.clear()

    def __len__(self) -> int:
        return len(self.end)

    def _at(self, node: int) -> int:
        return self.end[node]

    def _first_visitors(self, paths: Sequence[Sequence[int]]) -> list[int]:
        first = [len(paths)] * len(self)
        for request, path in enumerate(paths):
            for node in path:
                first[node] = min(first[node], request)
        return first

    def _below(self, node: int) -> dict[int, int]:
        return self._roots if node < 0 else self._children[node]

    def _add(self, parent: int, key: np.ndarray, begin: int) -> int:
        self.parent.append(parent)
        self.begin.append(begin)
        self.end.append(begin + int(key.size))
        self._keys.append(key)
        self._children.append({})
        self._below(parent)[int(key[0])] = len(self.end) - 1
        return len(self.end) - 1

    def _split(self, node: int, tokens: int) -> int:
        """Put the first `tokens` of `node` into a new node above it, and return that one."""
        key = self._keys[node]
        above = self._add(self.parent[node], key[:tokens], self.begin[node])
        self._children[above][int(key[tokens])] = node
        self.parent[node], self.begin[node] = above, self.begin[node] + tokens
        self._keys[node] = key[tokens:]
        return above

    def _insert(self, tokens: np.ndarray) -> None:
        node, at = -1, 0
        while at < tokens.size:
            child = self._below(node).get(int(tokens[at]))
            if child is None:
                self._add(node, tokens[at:], at)
                return
            key = self._keys[child]
            most = min(key.size, tokens.size - at)
            different = np.flatnonzero(key[:most] != tokens[at : at + most])
            same = int(different[0]) if different.size else int(most)
            if same < key.size:
                child = self._split(child, same)
            node, at = child, at + same

    def _path(self, tokens: np.ndarray) -> list[int]:
        path: list[int] = []
        node, at = -1, 0
        while at < tokens.size:
            node = self._below(node)[int(tokens[at])]
            path.append(node)
            at = self.end[node]
        return path

    def _cut(self, tokens: np.ndarray, at: int, request: int) -> None:
        """Let a node end where `request` can go on from at most, if somebody was there before."""
        for node in self._path(tokens):
            if self.begin[node] < at < self.end[node]:
                if self._first[node] < request:
                    self._split(node, at - self.begin[node])
                    self._first.append(self._first[node])
                return
