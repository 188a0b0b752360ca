"""Copy whole entries inside a raw pool buffer: copy-on-write of a request's recurrent state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_jenga.kernels.launch import (
    INDEX,
    can_launch,
    check_pool,
    check_range,
    check_tensor,
    device_of,
    entries,
    words,
)

MAX_BLOCK = 4096  # words per program


@triton.jit
def _copy_kernel(pool, src, dst, stride, entry_words, num_blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    copy = program // num_blocks
    source = tl.load(src + copy).to(tl.int64) * stride
    target = tl.load(dst + copy).to(tl.int64) * stride
    word = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < entry_words
    tl.store(pool + target + word, tl.load(pool + source + word, mask=inside), mask=inside)


def copy_entries(
    pool: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    entry_bytes: int,
    entry_stride_bytes: int | None = None,
) -> None:
    """Copy entry ``src[i]`` over entry ``dst[i]`` for every i, in one launch and in any order.

    Entry e is bytes ``[e * entry_stride_bytes, e * entry_stride_bytes + entry_bytes)``. One source
    may serve several targets; a target is named once and is nobody's source.

    Args:
        pool: the buffer, 1-D and contiguous, uint8 or int32.
        src: shape [num_copies], int32 or int64; may be empty.
        dst: shape [num_copies], int32 or int64.
        entry_bytes: bytes of an entry; fastest as a multiple of 8, at worst byte by byte.
        entry_stride_bytes: from one entry to the next, ``entry_bytes`` if not given.

    Raises:
        ValueError: a wrong shape, dtype or device; in host memory also an entry outside the pool
            or a target that is named twice or is a source.
    """
    stride_bytes = entry_bytes if entry_stride_bytes is None else entry_stride_bytes
    num_entries = check_pool(pool, entry_bytes, stride_bytes, "entry")
    check_tensor("src", src, INDEX, (None,), pool.device)
    check_tensor("dst", dst, INDEX, src.shape, pool.device)
    check_range("src", src, num_entries)
    check_range("dst", dst, num_entries)
    if not src.numel():
        return
    if pool.is_cpu and (dst.unique().numel() != dst.numel() or bool(torch.isin(dst, src).any())):
        raise ValueError("dst: expected entries named once and not in src")
    if not can_launch(_copy_kernel, pool):
        copy_entries_reference(pool, src, dst, entry_bytes, stride_bytes)
        return
    view, width = words(pool, entry_bytes, stride_bytes)
    entry_words = entry_bytes // width
    block = min(triton.next_power_of_2(entry_words), MAX_BLOCK)
    num_blocks = triton.cdiv(entry_words, block)
    with device_of(pool):
        _copy_kernel[(src.numel() * num_blocks,)](
            view,
            src.contiguous(),
            dst.contiguous(),
            stride_bytes // width,
            entry_words,
            num_blocks,
            BLOCK=block,
        )


def copy_entries_reference(
    pool: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    entry_bytes: int,
    entry_stride_bytes: int,
) -> None:
    """``copy_entries`` in plain torch, all arguments given."""
    rows = entries(pool, entry_bytes, entry_stride_bytes)
    rows.index_copy_(0, dst.long(), rows.index_select(0, src.long()))
