"""Requests with an encoder: how long it is, and what of them is asked for in whose name."""

from __future__ import annotations

from typing import Any


def encoder_length(req: Any) -> int:
    """Tokens of a request's encoder (all its images together), 0 without one: those that SGLang
    puts before the text."""
    inputs = None if req is None else req.multimodal_inputs
    return 0 if inputs is None else inputs.num_image_tokens or 0


def missing_encoder(req: Any) -> int:
    """Of these, the ones that its hit does not cover: all or none."""
    length = encoder_length(req)
    return length if req is not None and req.prefix_len < length else 0
