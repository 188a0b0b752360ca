"""Repairs of SGLang's CPU engine where it takes for granted what does not hold there.

None of them changes what is computed: without them the models with states do not start, or stop at
their first decode. `boot.cpu_table` says where each is put.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def has_no_gpu() -> bool:
    """A CUDA build of torch takes CUDA for granted even then: `device_module`, `pin_memory`."""
    return not torch.cuda.is_available()


def device_module(original: Callable[..., Any], device: Any = None) -> Any:
    """Qwen3-Next's layers ask the device module of nothing in particular for the current device;
    torch answers with CUDA's."""
    return torch.cpu if device is None else original(device)


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """SGLang pins the mask of tracked requests whatever the device; torch fails to."""
    return tensor


def align_no_heads(
    original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int
) -> Any:
    """SGLang rounds the attention heads up to a multiple of --tp on a CPU, and stops at a model
    that has none."""
    if model_config.num_attention_heads is None:
        return model_config
    return original(model_config, load_config, tp_size)


def length_of_padding(backend: Any) -> int:
    """Tokens that a row of padding has, at least one: `torch_native` attention over none is NaN.
    They are read where every row of padding is, in the null page."""
    return 1
