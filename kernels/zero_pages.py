"""Fill pages of a raw pool buffer with zero bytes.

For large pages that change element format: kernels that load whole pages multiply masked rows by 0,
and a stranger's bytes may read as NaN.
"""

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
def _zero_kernel(pool, page_ids, stride, page_words, num_blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    page = tl.load(page_ids + program // num_blocks).to(tl.int64)
    word = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pool + page * stride + word, 0, mask=word < page_words)


def zero_pages(
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    page_bytes: int,
    page_stride_bytes: int | None = None,
) -> None:
    """Set bytes ``[id * page_stride_bytes, id * page_stride_bytes + page_bytes)`` to zero.

    Runs on the current stream; the caller orders it behind whoever may still write there.

    Args:
        pool: the buffer, 1-D and contiguous, uint8 or int32.
        page_ids: shape [num_pages], int32 or int64; may be empty, repeats are harmless.
        page_bytes: bytes of a page; fastest as a multiple of 8, at worst byte by byte.
        page_stride_bytes: from one page to the next, ``page_bytes`` if not given.

    Raises:
        ValueError: a wrong shape, dtype or device; in host memory also an id outside the pool.
    """
    stride_bytes = page_bytes if page_stride_bytes is None else page_stride_bytes
    num_pages = check_pool(pool, page_bytes, stride_bytes, "page")
    check_tensor("page_ids", page_ids, INDEX, (None,), pool.device)
    check_range("page_ids", page_ids, num_pages)
    if not page_ids.numel():
        return
    if not can_launch(_zero_kernel, pool):
        zero_pages_reference(pool, page_ids, page_bytes, stride_bytes)
        return
    view, width = words(pool, page_bytes, stride_bytes)
    page_words = page_bytes // width
    block = min(triton.next_power_of_2(page_words), MAX_BLOCK)
    num_blocks = triton.cdiv(page_words, block)
    with device_of(pool):
        _zero_kernel[(page_ids.numel() * num_blocks,)](
            view, page_ids.contiguous(), stride_bytes // width, page_words, num_blocks, BLOCK=block
        )


def zero_pages_reference(
    pool: torch.Tensor, page_ids: torch.Tensor, page_bytes: int, page_stride_bytes: int
) -> None:
    """``zero_pages`` in plain torch, all arguments given."""
    # Not ``rows[ids] = 0``: on a device that copies the 0 there, and the host waits for it.
    entries(pool, page_bytes, page_stride_bytes).index_fill_(0, page_ids.long(), 0)
