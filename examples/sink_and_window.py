"""A policy of one's own: attention sinks. A window layer that also reads the first tokens.

Models with attention sinks (StreamingLLM) attend to the first few tokens and to the last `window`
ones. With the built-in window policy the first tokens would age behind the window, and a hit would
not ask for them. Install this file as a plugin of SGLang's and serve as usual:

    [project.entry-points."sglang.srt.plugins"]
    sink_and_window = "sink_and_window:load"

    python -m sglang.launch_server --model-path M --memory-backend jenga
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, register_policy

SINK_TOKENS = 4


@dataclass(frozen=True)
class SinkAndWindow(LayerPolicy):
    """The next token sees the first ``sink`` tokens and ``reach`` tokens before it."""

    sink: int
    reach: int

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        ranges = list(cached)
        first = ranges[-1] if ranges and ranges[-1][0] == 0 else (0, 0)
        if first[1] < min(self.sink, prefix.length):
            return first[1]  # the sink is torn: only a prefix inside of it is left
        long_enough = (end for begin, end in ranges if end - begin >= self.reach)
        return max(first[1], *long_enough, 0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        window = max(0, prefix.length - self.reach)
        if window <= self.sink:
            return ((0, prefix.length),)
        return ((0, self.sink), (window, prefix.length))


def load() -> None:
    register_policy("window", lambda window: SinkAndWindow(SINK_TOKENS, window - 1))
