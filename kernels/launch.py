"""What the kernels here share: argument checks, raw views, and whether a kernel can run at all.

A check costs no wait for the device: shapes, dtypes, strides and devices always, values only where
they lie in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

INDEX = (torch.int32, torch.int64)
# Kernels move bits and never look at them, so a type is known by its width alone. Triton's
# interpreter, which is numpy, has no bf16 and no fp8.
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless ``tensor`` has one of ``dtypes``, lies on ``device`` and fits
    ``shape``, where None stands for any length."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if fits and tensor.dtype in dtypes and device in (None, tensor.device):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    lengths = ", ".join("any" if want is None else str(want) for want in shape)
    raise ValueError(
        f"{name}: expected {kinds} [{lengths}] on {device or 'any device'}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    )


def check_range(name: str, ids: torch.Tensor, limit: int) -> None:
    """Raise ValueError if host ids leave ``[0, limit)``; ids on a device are not read."""
    if ids.is_cpu and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: expected ids in [0, {limit}), got {low} to {high}")


def can_launch(kernel: Any, tensor: torch.Tensor) -> bool:
    """Whether ``kernel`` runs where ``tensor`` lies: on CUDA, or anywhere when it was decorated
    under ``TRITON_INTERPRET=1``."""
    return tensor.is_cuda or not isinstance(kernel, triton.JITFunction)


def are_interpreted() -> bool:
    """Whether kernels decorated from now on run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Context in which Triton launches on the tensor's device and that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as integers of the same width: same shape, strides and memory."""
    return tensor.view(RAW[tensor.element_size()])


def words(pool: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, int]:
    """A byte buffer as the widest words, up to 8 bytes, that divide all ``sizes`` and its address.

    Returns the words, ``[pool bytes // width]``, and the width in bytes; a tail of the buffer that
    is no whole word is left out.
    """
    whole = pool.view(torch.uint8)
    width = next(
        width for width in (8, 4, 2, 1) if not any(n % width for n in (whole.data_ptr(), *sizes))
    )
    return whole[: whole.numel() // width * width].view(RAW[width]), width


def entries(pool: torch.Tensor, entry_bytes: int, stride_bytes: int) -> torch.Tensor:
    """The entries of a byte buffer as rows of the widest words, ``[num_entries, words]``."""
    view, width = words(pool, entry_bytes, stride_bytes)
    count = (pool.numel() * pool.element_size() - entry_bytes) // stride_bytes + 1
    shape, stride = (count, entry_bytes // width), (stride_bytes // width, 1)
    return view.as_strided(shape, stride, view.storage_offset())


def check_pool(pool: torch.Tensor, entry_bytes: int, stride_bytes: int, what: str) -> int:
    """Check a raw buffer that is cut in entries; return how many whole ones it holds.

    Entry i is bytes ``[i * stride_bytes, i * stride_bytes + entry_bytes)``.
    """
    check_tensor("pool", pool, (torch.uint8, torch.int32), (None,))
    if not pool.is_contiguous():
        raise ValueError(f"pool: expected contiguous bytes, got stride {pool.stride(0)}")
    if entry_bytes <= 0 or stride_bytes < entry_bytes:
        raise ValueError(
            f"{what}: expected 0 < bytes <= stride, got {entry_bytes} and {stride_bytes}"
        )
    num_bytes = pool.numel() * pool.element_size()
    return (num_bytes - entry_bytes) // stride_bytes + 1 if num_bytes >= entry_bytes else 0
