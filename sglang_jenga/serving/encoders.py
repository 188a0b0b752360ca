"""Requests with an encoder: how long it is, and what of them is asked for in whose name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def encoder_length(req: Any) -> int:
    """Tokens of a request's encoder (all its images together), 0 without one: those that SGLang
    puts before the text."""
    inputs = None if req is None else req.multimodal_inputs
    return 0 if inputs is None else inputs.num_image_tokens or 0


def image_ends(req: Any) -> Sequence[int]:
    """Where each image ends that has a name of its own (`serving.images`), the last one where the
    text begins; nothing without images."""
    length = encoder_length(req)
    if not length:
        return ()
    ends = tuple(accumulate(req.multimodal_inputs.image_pad_len or ()))
    # A session's later turns add images that SGLang does not count: they stay in one piece.
    return ends if ends and ends[-1] == length else (length,)


def missing_encoder(req: Any) -> int:
    """Of the encoder's tokens, those that the request's hit does not cover."""
    return max(0, encoder_length(req) - req.prefix_len) if req is not None else 0
