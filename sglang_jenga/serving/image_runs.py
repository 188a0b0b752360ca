"""Images whose tokens come in several runs, looked up one by one.

Where each row of an image ends with a token of its own (Pixtral, Mistral 3), SGLang makes and keeps
one embedding of all images of a prompt: with one more image all of them are encoded again, and a
chunk encodes images that it has no row of. What it does for audio in several runs is right for
images too: each is looked up by its own hash, and those that are missing are encoded in one call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.managers import mm_schedule

from sglang_jenga.serving.embeddings import PooledEmbeddings

logger = logging.getLogger(__name__)


class _OtherRows(Exception):
    """A tower made another number of rows than its images have tokens."""


def embedding_of_chunk(
    original: Callable[..., Any],
    data_embedding_func: Callable[[list[Any]], Any],
    embedding_items_per_req: list[Any],
    items_offset: Sequence[tuple[int, int]],
    extend_prefix_len: int,
    extend_seq_len: int,
    input_ids: torch.Tensor,
    device: torch.device,
) -> Any:
    """Rows of a chunk's image tokens, ``[tokens, width]``, and its input ids. SGLang has seen that
    there is one. Anything but images is left to it, and so are images that cannot be told apart."""
    items, cache = embedding_items_per_req, mm_schedule.embedding_cache
    rest = (items_offset, extend_prefix_len, extend_seq_len, input_ids, device)
    if (
        not isinstance(cache, PooledEmbeddings)
        or not cache.one_by_one
        or not all(item.is_image() for item in items)
    ):
        return original(data_embedding_func, items, *rest)

    @functools.wraps(data_embedding_func)
    def counted(missing: list[Any]) -> Any:
        made = data_embedding_func(missing)
        wanted = [sum(end - start + 1 for start, end in item.offsets) for item in missing]
        if _rows(made) not in (wanted, [sum(wanted)]):
            raise _OtherRows(f"{_rows(made)} rows for images of {wanted} tokens")
        return made

    # By its name and its model SGLang knows who moves the pixels to the device.
    counted.__self__ = getattr(data_embedding_func, "__self__", None)  # type: ignore[attr-defined]
    try:
        parts = mm_schedule._get_chunked_embedding_by_item(
            counted, items, extend_prefix_len, extend_seq_len, device
        )
    except _OtherRows as difference:
        # SGLang makes do with such rows: the model is served, each prompt's images together.
        cache.one_by_one = False
        logger.warning("jenga: images of a prompt are looked up together (%s)", difference)
        return original(data_embedding_func, items, *rest)
    return torch.cat(parts), input_ids


def _rows(made: Any) -> list[int]:
    """Per tensor that a tower made, one for each image or one for all."""
    tensors = made if isinstance(made, list) else [made]
    return [part.reshape(-1, part.shape[-1]).shape[0] for part in tensors]
