"""What a vision tower makes of images, kept in the pool's idle large pages (paper section 5.3).

SGLang keeps it in a cache of a fixed size beside the KV pool. Here an image is a guest of empty
large pages (`pages.guests`): it takes memory from nobody, has no limit but the pool, and goes
before any cached prefix. Only while a prompt in flight has rows of it left to compute do cached
prefixes go first, both to store it and to keep it. Running requests come before it always.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultimodalCache

from sglang_jenga.memory.byte_strings import ByteStrings
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.guests import Guests
from sglang_jenga.serving.eviction import Eviction
from sglang_jenga.serving.pressure import Need, Release

logger = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """``result``: what SGLang handed in, but for its tensor."""

    result: EmbeddingResult
    shape: torch.Size
    dtype: torch.dtype


class PooledEmbeddings(MultimodalCache):
    """SGLang's cache of embeddings by hash. What it returns is a copy, so a page may be written
    again by whatever comes later on the forward stream.

    ``not_kept``: times that an embedding had no place. SGLang computes with it all the same, and
    encodes its image again for the next chunk. ``one_by_one``: images that are several runs of
    tokens are looked up so (`serving.image_runs`).
    """

    def __init__(
        self,
        guests: Guests,
        strings: ByteStrings,
        eviction: Eviction,
        metric_labels: dict[str, str] | None = None,
    ) -> None:
        self._guests, self._strings, self._eviction = guests, strings, eviction
        self._kept: dict[Hashable, _Kept] = {}
        self.not_kept = 0
        self.one_by_one = True
        self._metric = None
        if metric_labels is not None:
            from prometheus_client import Counter  # after SGLang set its directory

            metric = Counter(
                "sglang:jenga_embeddings_not_kept_total",
                "Embeddings of images that found no place in the pool.",
                labelnames=list(metric_labels),
            )
            self._metric = metric.labels(**metric_labels)

    # ---- SGLang's cache ---------------------------------------------------------------------

    def get(self, mm_hashes: list[int], combined_hash: int | None = None) -> EmbeddingResult | None:
        """The embedding of several images in one, as stock has it."""
        return self.get_single(self.combine_hashes(mm_hashes))

    def get_single(self, mm_hash: int | None) -> EmbeddingResult | None:
        large_ids = self._guests.get(mm_hash)
        if large_ids is None:
            return None
        result, shape, dtype = self._kept[mm_hash]
        return replace(result, embedding=self._strings.read(large_ids, shape, dtype))

    def set(self, mm_hash: int | None, embedding: EmbeddingResult, loc: Any = None) -> bool:
        """Whether it is kept, whole; it is if there is one of that hash."""
        if self.has(mm_hash):
            return True
        tensor = embedding.embedding
        count = self._strings.num_larges(tensor)
        large_ids = self._guests.admit(mm_hash, count, self._eviction.of_larges)
        if large_ids is None:
            self._report_not_kept(count)
            return False
        self._strings.write(large_ids, tensor)
        if len(self._kept) > 2 * len(self._guests):
            present = set(self._guests.keys)
            self._kept = {key: kept for key, kept in self._kept.items() if key in present}
        nothing = replace(embedding, embedding=tensor.new_empty(0))
        self._kept[mm_hash] = _Kept(nothing, tensor.shape, tensor.dtype)
        return True

    def has(self, mm_hash: int | None) -> bool:
        return self._guests.get(mm_hash) is not None

    def free(self, mm_hash: int | None, mm_embedding_allocator: Any = None) -> bool:
        self._kept.pop(mm_hash, None)
        return self._guests.drop(mm_hash)

    def clear(self) -> None:
        self._guests.clear()
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._guests)

    def available_size(self) -> int:
        return len(self)

    def check(self) -> None:
        """Recount. For tests and debugging."""
        self._guests.check()
        assert set(self._guests.keys) <= self._kept.keys()

    def _report_not_kept(self, count: int) -> None:
        self.not_kept += 1
        if self._metric is not None:
            self._metric.inc()
        logger.log(
            logging.WARNING if self.not_kept == 1 else logging.DEBUG,
            "jenga: no %d idle large pages for the embedding of an image; if its prompt goes on in "
            "another chunk it is encoded again (%d times so far, the first is a warning)",
            count,
            self.not_kept,
        )

    # ---- who still wants an image -----------------------------------------------------------

    def note_chunk(
        self,
        items: Sequence[Any],
        bounds: Sequence[int],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """A step computes ``lengths[i]`` tokens from ``starts[i]`` on of request i, whose images
        are ``items[bounds[i]:bounds[i + 1]]``: those that end behind it are wanted again."""
        seen: set[Hashable] = set()
        left: set[Hashable] = set()
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            mine = items[bounds[i] : bounds[i + 1]] if i + 1 < len(bounds) else ()
            hashes = [item.hash for item in mine]
            ends = [item.offsets[-1][1] if item.offsets else -1 for item in mine]
            goes_on = [
                item.hash for item, end in zip(mine, ends, strict=True) if end >= start + length
            ]
            whole = self.combine_hashes(hashes)
            seen.update(hashes, (whole,))
            left.update(goes_on, (whole,) if goes_on else ())
        self._guests.want((self._guests.wanted - seen) | left)

    def note_no_prompt_in_flight(self) -> None:
        """No prompt is computed in part, so nobody wants an image again."""
        self._guests.want(())


class WantedImages(Release):
    """Cached prefixes go before images that the prompt in flight has rows left of."""

    def __init__(self, guests: Guests, core: Allocator, eviction: Eviction) -> None:
        self._guests, self._core, self._eviction = guests, core, eviction

    def free(self, until: Need) -> bool:
        wanted = self._guests.num_wanted_larges
        if wanted:
            self._eviction.of_larges(self._core.larges_missing(until.smalls, left=wanted))
        return until.met


def before_embedding(
    data_embedding_func: Any,
    embedding_items: Sequence[Any],
    items_size: Sequence[int],
    prefix_length: Sequence[int],
    extend_length: Sequence[int],
    *_: Any,
    **__: Any,
) -> None:
    """SGLang is about to look a step's images up."""
    cache = mm_schedule.embedding_cache
    if isinstance(cache, PooledEmbeddings):
        cache.note_chunk(embedding_items, items_size, prefix_length, extend_length)
