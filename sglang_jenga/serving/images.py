"""Images of one request, named, hit and encoded one by one, in mllama.

SGLang names all images of a request by one hash, and encodes all of them or none. What
cross-attention layers keep of an image depends on nothing but the image. So here each has a name of
its own; a hit may end behind any of them, and only the images behind it are encoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.mm_utils import hash_feature
from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE, MultimodalInputs

# What SGLang's model reads of a request's images, each ``[1, images, ...]``.
_PER_IMAGE = ("aspect_ratio_ids", "aspect_ratio_mask")


def name_images(
    original: Callable[..., Any], self: Any, input_ids: Any, mm_inputs: MultimodalInputs
) -> Any:
    """The prompt behind its images' tokens, each image's name as often as it has tokens."""
    padded = original(self, input_ids, mm_inputs)
    names = _names(mm_inputs.mm_items)
    length = mm_inputs.num_image_tokens
    if not names or length % len(names):
        if length:
            mm_inputs.image_pad_len = [length]
        return padded  # one name for all, SGLang's
    each = length // len(names)
    mm_inputs.image_pad_len = [each] * len(names)
    return array("q", (name for name in names for _ in range(each))) + padded[length:]


def _names(items: Sequence[Any]) -> list[int]:
    """A name per image, beyond all tokens of text; none where SGLang has not put all images into
    one tensor."""
    if len(items) != 1 or not isinstance(items[0].feature, torch.Tensor):
        return []
    item = items[0]
    pixels, shapes = item.feature, item.model_specific_data[_PER_IMAGE[0]]
    if pixels.shape[0] != 1:
        return []
    count = pixels.shape[1]
    # SGLang has hashed the only one, or all of them, where users want images hashed.
    if count == 1 or envs.SGLANG_MM_SKIP_COMPUTE_HASH.get():
        hashes = [(item.hash, at) for at in range(count)]
    else:
        hashes = [(hash_feature(pixels[:, at : at + 1]), 0) for at in range(count)]
    # Images of the same tiles in another order of rows and columns are other images.
    return [
        _name(*hashed, int(shape))
        for hashed, shape in zip(hashes, shapes.reshape(-1)[:count], strict=True)
    ]


def _name(image_hash: int, place: int, shape: int) -> int:
    digest = hashlib.sha256(f"image {image_hash} {place} {shape}".encode()).digest()
    return MM_PAD_SHIFT_VALUE + (int.from_bytes(digest[:8], "big") >> 2)


# ---- a step of prompts ----------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Rest:
    """A request without the images that it hits, in what SGLang reads to sort a step's tokens."""

    multimodal_inputs: MultimodalInputs
    extend_len: int
    logprob_start_len: int
    prefix_len: int = 0


def sort_step(
    original: Callable[..., None], self: Any, input_ids: list[Any], seq_lens: list[int]
) -> None:
    """SGLang sorts a step's tokens and slots into encoders' and text, and stops at a hit that ends
    between a request's images: it gets the request as if it had only those behind the hit."""
    hits = {
        index: req.prefix_len
        for index, req in enumerate(self.reqs)
        if (inputs := req.multimodal_inputs) is not None
        and 0 < req.prefix_len < (inputs.num_image_tokens or 0)
    }
    if not hits:
        return original(self, input_ids, seq_lens)
    reqs, rests = self.reqs, list(self.reqs)
    for index, hit in hits.items():
        req = reqs[index]
        rest = _images_behind(req.multimodal_inputs, hit)
        rests[index] = _Rest(rest, req.extend_len, req.logprob_start_len)
        self.multimodal_inputs[index] = rest
        self.prefix_lens[index] = 0
        seq_lens[index] -= hit
    self.reqs = rests
    try:
        original(self, input_ids, seq_lens)
    finally:
        self.reqs = reqs
    for index, hit in hits.items():
        self.encoder_lens_cpu[index] += hit
        reqs[index].logprob_start_len = max(
            reqs[index].logprob_start_len, self.encoder_lens_cpu[index]
        )
    lens = torch.tensor(self.encoder_lens_cpu, dtype=torch.int64)
    self.encoder_lens = lens.to(self.device, non_blocking=True)


def _images_behind(inputs: MultimodalInputs, hit: int) -> MultimodalInputs:
    """The images whose tokens a hit of so many does not cover."""
    lengths = inputs.image_pad_len
    (count,) = (at for at in range(1, len(lengths)) if sum(lengths[:at]) == hit)
    (item,) = inputs.mm_items
    data = item.model_specific_data
    rest = type(item)(
        modality=item.modality,
        feature=item.feature[:, count:],
        model_specific_data=data | {name: data[name][:, count:] for name in _PER_IMAGE},
    )
    return dataclasses.replace(
        inputs,
        mm_items=[rest],
        image_pad_len=lengths[count:],
        num_image_tokens=inputs.num_image_tokens - hit,
    )


def images_to_encode(original: Callable[..., Any], self: Any, forward_batch: Any) -> Any:
    """Of a step's requests the images that are encoded, and how many tokens they take: SGLang
    counts those of all images of a request that lacks any."""
    images, shapes, masks, lens = original(self, forward_batch)
    if lens is not None:
        lens = [
            inputs.num_image_tokens
            for inputs, cached in zip(
                forward_batch.mm_inputs, forward_batch.encoder_cached, strict=True
            )
            if inputs is not None and not cached
        ]
    return images, shapes, masks, lens
