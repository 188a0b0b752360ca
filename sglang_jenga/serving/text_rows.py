"""Which rows of a step are of requests without an image, in mllama.

SGLang counts through a step of prompts by the lengths of the requests' encoders, and of whole
requests, where it should by their new tokens. A text-only request behind one with an image is then
taken to have one, and its answer begins with a wrong token; and one with a cached prefix takes the
images from the requests behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def mask(original: Callable[..., Any], self: Any, forward_batch: Any) -> Any:
    """True for each new token, ``[tokens, 1]``, whose request has an image."""
    if forward_batch.forward_mode.is_decode():
        return original(self, forward_batch)
    has_image = torch.tensor([length > 0 for length in forward_batch.encoder_lens_cpu])
    lens = torch.tensor(forward_batch.extend_seq_lens_cpu)
    mask = has_image.repeat_interleave(lens).reshape(-1, 1)
    return mask.to(forward_batch.seq_lens.device)
