"""A policy of one's own: hits that end at whole blocks.

A prompt that goes on from a hit is cut into chunks from there on, and sums over other chunks differ
in their last digits. With hits at multiples of a block that the chunks are multiples of as well, an
answer does not depend on what happened to be cached. Install this file as a plugin of SGLang's and
serve a model with window layers as usual:

    [project.entry-points."sglang.srt.plugins"]
    whole_blocks = "whole_blocks:load"

    python -m sglang.launch_server --model-path M --memory-backend jenga

What a step reads, and so what a request keeps, is the layer type's to say: a policy that reads
other tokens than the type keeps is refused when the server starts. Layers that do read others, as
with attention sinks, are a type of their own: see `sink_window` beside this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_jenga.layers.window import WindowPolicy
from sglang_jenga.radix.policy import Prefix, Range, register_policy

BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class WholeBlocks(WindowPolicy):
    """As a window, but that a hit ends at a multiple of ``block`` tokens. All groups of a model
    agree on a hit, so it does so in the others too."""

    block: int = BLOCK_TOKENS

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        ranges, length = list(cached), prefix.length
        while length:
            length -= length % self.block
            before = ((begin, min(end, length)) for begin, end in ranges if begin < length)
            # Without a dot in front: a class with slots is made anew, and super() would miss it.
            found = WindowPolicy.get_possible_prefix(self, Prefix(length), before)
            if found == length:
                break
            length = found
        return length


def load() -> None:
    register_policy("window", lambda window: WholeBlocks(window - 1))
