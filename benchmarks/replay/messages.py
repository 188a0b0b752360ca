"""Requests as SGLang's tokenizer process sends them to its scheduler."""

from __future__ import annotations

from array import array

import numpy as np
import torch
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)

from benchmarks.replay.requests import Request
from sglang_jenga.testing.messages import message

TILES = 4
"""What Llama 3.2 Vision pads every image to."""
_TWO_BY_TWO = 6
"""That model's number for an image of two by two tiles."""


def tokenized(request: Request, *, known_length: bool) -> TokenizedGenerateReqInput:
    """The request; of its image's tokens SGLang's scheduler makes up its own, as many."""
    # No answer holds the end-of-sequence token, so it ends by its length either way; but admission
    # sets room aside for all of it only if that token is to be ignored.
    sampling = {"max_new_tokens": request.output.size, "ignore_eos": known_length}
    text = request.prompt[request.encoder :]
    return message(
        request.rid,
        array("q", text.astype(np.int64).tobytes()),
        sampling,
        mm_inputs=_image(int(request.prompt[0])) if request.encoder else None,
    )


def _image(number: int) -> MultimodalProcessorOutput:
    """An image of four tiles, each of one pixel, which nobody looks at: SGLang names an image by
    its pixels and counts its tokens by its tiles."""
    image = MultimodalDataItem(
        modality=Modality.IMAGE,
        feature=torch.full((1, 1, TILES, 1, 1, 1), number),
        model_specific_data={
            "aspect_ratio_ids": torch.full((1, 1), _TWO_BY_TWO),
            "aspect_ratio_mask": torch.ones(1, 1, TILES, dtype=torch.int64),
        },
    )
    return MultimodalProcessorOutput(mm_items=[image])
