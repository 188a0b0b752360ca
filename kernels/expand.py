"""Small-page ids to slots, written into rows of SGLang's ``req_to_token``, a batch per launch.

Position p of a request lies in slot ``id * page_size + p % page_size`` of a group, ``id`` being the
small page that holds p. A page behind the window has id 0, the null page, and so do its slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_jenga.kernels.launch import INDEX, can_launch, check_range, check_tensor, device_of

BLOCK = 512  # tokens per program


@triton.jit
def _expand_kernel(
    page_ids,
    window_ids,
    indptr,
    rows,
    starts,
    ends,
    table,
    window_table,
    table_row,
    table_column,
    window_row,
    window_column,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    start = tl.load(starts + request).to(tl.int64)
    end = tl.load(ends + request).to(tl.int64)
    position = start + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < end

    first = tl.load(indptr + request).to(tl.int64)
    index = first + position // PAGE_SIZE - start // PAGE_SIZE
    offset = position % PAGE_SIZE
    row = tl.load(rows + request).to(tl.int64)

    slot = tl.load(page_ids + index, mask=inside, other=0).to(tl.int64) * PAGE_SIZE + offset
    to = table + row * table_row + position * table_column
    tl.store(to, slot.to(tl.int32), mask=inside)
    if HAS_WINDOW:
        slot = tl.load(window_ids + index, mask=inside, other=0).to(tl.int64) * PAGE_SIZE + offset
        to = window_table + row * window_row + position * window_column
        tl.store(to, slot.to(tl.int32), mask=inside)


def expand(
    page_ids: torch.Tensor,
    indptr: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    table: torch.Tensor,
    *,
    page_size: int,
    max_tokens: int,
    window_ids: torch.Tensor | None = None,
    window_table: torch.Tensor | None = None,
) -> None:
    """Write the slots of positions ``[starts[i], ends[i])`` of each request into its row.

    ``table[rows[i], p]`` becomes the slot of position p; nothing else is touched. Request i's ids,
    ``page_ids[indptr[i] : indptr[i + 1]]``, are the small pages that hold those positions: the
    first holds ``starts[i]``, the last ``ends[i] - 1``. With ``window_ids`` and ``window_table``,
    the window group's ids in the same places, the same launch fills the window group's rows.

    Args:
        page_ids: ids, shape [num_pages], int32 or int64.
        indptr: where each request's ids begin, shape [num_requests + 1], int32 or int64.
        rows: a row of the tables per request, no row twice, shape [num_requests], int32 or int64.
        starts: first position, shape [num_requests], int32 or int64.
        ends: position behind the last, shape [num_requests]; equal to the start for no tokens.
        table: shape [num_rows, max_positions], int32, any strides; a slice of ``req_to_token``.
        page_size: tokens per small page.
        max_tokens: at least the longest ``ends[i] - starts[i]``; the host knows it, the launch
            needs it.
        window_ids: shape [num_pages], of the dtype of ``page_ids``; 0 behind the window.
        window_table: shape of ``table``, int32, any strides.

    Raises:
        ValueError: a wrong shape, dtype or device; in host memory also a wrong value.
    """
    if (window_ids is None) != (window_table is None):
        raise ValueError("window_ids and window_table: expected both or neither, got one")
    _check(page_ids, indptr, rows, starts, ends, table, page_size, max_tokens)
    if window_ids is not None:
        check_tensor("window_ids", window_ids, (page_ids.dtype,), page_ids.shape, table.device)
        check_tensor("window_table", window_table, (torch.int32,), table.shape, table.device)
        _check_contiguous(window_ids=window_ids)
    if not rows.numel() or not max_tokens:
        return
    if not can_launch(_expand_kernel, table):
        expand_reference(page_ids, indptr, rows, starts, ends, table, page_size)
        if window_ids is not None:
            expand_reference(window_ids, indptr, rows, starts, ends, window_table, page_size)
        return
    has_window = window_ids is not None
    second_ids, second = (window_ids, window_table) if has_window else (page_ids, table)
    with device_of(table):
        _expand_kernel[(rows.numel(), triton.cdiv(max_tokens, BLOCK))](
            page_ids,
            second_ids,
            indptr,
            rows,
            starts,
            ends,
            table,
            second,
            *table.stride(),
            *second.stride(),
            PAGE_SIZE=page_size,
            HAS_WINDOW=has_window,
            BLOCK=BLOCK,
        )


def expand_reference(
    page_ids: torch.Tensor,
    indptr: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    table: torch.Tensor,
    page_size: int,
) -> None:
    """``expand`` for one table, in plain torch: a loop over requests."""
    offsets = torch.arange(page_size, device=page_ids.device)
    bounds = indptr.tolist()
    requests = zip(
        rows.tolist(), starts.tolist(), ends.tolist(), bounds[:-1], bounds[1:], strict=True
    )
    for row, start, end, first, last in requests:
        slots = (page_ids[first:last, None].long() * page_size + offsets).ravel()
        skipped = start % page_size
        table[row, start:end] = slots[skipped : skipped + end - start].to(table.dtype)


def _check_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got stride {tensor.stride(0)}")


def _check(
    page_ids: torch.Tensor,
    indptr: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    table: torch.Tensor,
    page_size: int,
    max_tokens: int,
) -> None:
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1, got {page_size}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens: expected at least 0, got {max_tokens}")
    check_tensor("table", table, (torch.int32,), (None, None))
    device, batch = table.device, rows.shape[0] if rows.dim() else 0
    check_tensor("page_ids", page_ids, INDEX, (None,), device)
    check_tensor("rows", rows, INDEX, (None,), device)
    check_tensor("indptr", indptr, INDEX, (batch + 1,), device)
    check_tensor("starts", starts, INDEX, (batch,), device)
    check_tensor("ends", ends, INDEX, (batch,), device)
    _check_contiguous(page_ids=page_ids, indptr=indptr, rows=rows, starts=starts, ends=ends)
    check_range("rows", rows, table.shape[0])
    if device.type != "cpu" or not batch:
        return
    if rows.unique().numel() != batch:
        raise ValueError("rows: expected every row once, got one twice")
    if int(starts.min()) < 0 or bool((ends < starts).any()) or int(ends.max()) > table.shape[1]:
        raise ValueError(f"starts, ends: expected 0 <= start <= end <= {table.shape[1]}")
    if int((ends - starts).max()) > max_tokens:
        raise ValueError(f"max_tokens: expected {int((ends - starts).max())}, got {max_tokens}")
    pages = (ends + page_size - 1) // page_size - starts // page_size
    pages[starts == ends] = 0
    held = indptr[1:] - indptr[:-1]
    if int(indptr[0]) != 0 or int(indptr[-1]) != page_ids.numel() or bool((held < pages).any()):
        raise ValueError(
            f"indptr: expected to run from 0 to {page_ids.numel()} over {pages.tolist()} pages, "
            f"got {indptr.tolist()}"
        )
