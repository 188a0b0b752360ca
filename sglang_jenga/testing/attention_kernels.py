"""The paged attention kernels that SGLang serves with, each called on views of a pool.

A kernel is prepared once for a batch, which is not timed (SGLang plans once per step, not per
layer), and gives a function that attends over one layer. Decode is a batch with one query each;
prefill has more, and their K and V are in the pool already.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sglang_jenga.testing.attention_batch import Batch
from sglang_jenga.testing.attention_layouts import Attention, PagedKV

Attend = Callable[[torch.Tensor, PagedKV], torch.Tensor]
"""``(q [num_queries, num_q_heads, dim], one layer) -> [num_queries, num_q_heads, dim]``."""

TRITON_OPS = ("decode_attention", "extend_attention")
MAX_KV_SPLITS = 8  # SGLang's default of --triton-attention-num-kv-splits
FLASHINFER_WORKSPACE_BYTES = 256 << 20


def on(device: str | torch.device, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(array).to(device, dtype)


# ---- SGLang's Triton kernels ----------------------------------------------------------------


def triton_ops() -> list[Any]:
    return [importlib.import_module(f"sglang.kernels.ops.attention.{name}") for name in TRITON_OPS]


def page_strides(view: torch.Tensor, page_size: int) -> tuple[int, int, int, int]:
    """Strides of a slot, a head, a page and a token of a view by slot or by page."""
    if view.dim() == 3:
        slot, head = view.stride()[:2]
        return slot, head, slot * page_size, slot
    page, token, head = view.stride()[:3]
    return token, head, page, token


@contextmanager
def taking_pages(ops: list[Any]) -> Iterator[None]:
    """The kernels take a page stride and a token stride; SGLang's wrappers compute both from a view
    by slot, which page-layer has not. Inside, they take ``[page, token, head, dim]`` as well."""
    before = [module._extract_kv_strides for module in ops]
    for module in ops:
        module._extract_kv_strides = page_strides
    try:
        yield
    finally:
        for module, original in zip(ops, before, strict=True):
            module._extract_kv_strides = original


def prepare_triton(batch: Batch, group: Attention, device: str, ops: list[Any]) -> Attend:
    """As in SGLang's Triton backend: slot by slot, the window's slots alone in a window layer."""
    decode, extend = ops
    if (batch.q_lens == 1).all():
        return _triton_decode(batch, group, device, decode, ops)
    return _triton_extend(batch, group, device, extend, ops)


def _buffers(kv: PagedKV) -> PagedKV:
    return kv.rows() if kv.has_rows else kv


def _triton_decode(
    batch: Batch, group: Attention, device: str, decode: Any, ops: list[Any]
) -> Attend:
    starts = np.zeros_like(batch.kv_lens)
    if group.window is not None:
        starts = np.maximum(batch.kv_lens - group.window, 0)
    indptr = on(device, np.append(0, np.cumsum(batch.kv_lens - starts)), torch.int32)
    indices = on(device, batch.slots(starts, batch.kv_lens), torch.int64)
    requests = batch.kv_lens.size
    shape = (requests, group.num_q_heads, MAX_KV_SPLITS, group.dim)
    logits = torch.empty(shape, dtype=torch.float32, device=device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=device)
    splits = torch.full((requests,), MAX_KV_SPLITS, dtype=torch.int32, device=device)

    def attend(q: torch.Tensor, kv: PagedKV) -> torch.Tensor:
        out = torch.empty_like(q)
        with taking_pages(ops):
            decode.decode_attention_fwd(
                q,
                *_buffers(kv),
                out,
                indptr,
                indices,
                logits,
                lse,
                splits,
                MAX_KV_SPLITS,
                group.dim**-0.5,
                1.0,
                1.0,
                page_size=batch.page_size,
            )
        return out

    return attend


def _triton_extend(
    batch: Batch, group: Attention, device: str, extend: Any, ops: list[Any]
) -> Attend:
    """The prefix is read from the pool, the new tokens' K and V from tensors of their own."""
    prefix = batch.kv_lens - batch.q_lens
    starts = np.zeros_like(prefix)
    if group.window is not None:
        starts = np.maximum(prefix - (group.window - 1), 0)
    indptr = on(device, np.append(0, np.cumsum(prefix - starts)), torch.int32)
    indices = on(device, batch.slots(starts, prefix), torch.int64)
    new_slots = on(device, batch.slots(prefix, batch.kv_lens), torch.int64)
    q_indptr = on(device, batch.q_indptr, torch.int32)
    new: dict[int, list[torch.Tensor]] = {}

    def attend(q: torch.Tensor, kv: PagedKV) -> torch.Tensor:
        if kv.k.data_ptr() not in new:
            # In a forward they come from the projections; gathered once, in the first call.
            pages, offsets = new_slots // batch.page_size, new_slots % batch.page_size
            new[kv.k.data_ptr()] = [part[pages, offsets] for part in kv]
        out = torch.empty_like(q)
        with taking_pages(ops):
            extend.extend_attention_fwd(
                q,
                *new[kv.k.data_ptr()],
                out,
                *_buffers(kv),
                q_indptr,
                indptr,
                indices,
                None,
                True,
                None,
                int(batch.q_lens.max()),
                1.0,
                1.0,
                sliding_window_size=-1 if group.window is None else group.window - 1,
                page_size=batch.page_size,
            )
        return out

    return attend


# ---- FlashInfer -----------------------------------------------------------------------------


def prepare_flashinfer(
    batch: Batch, group: Attention, device: str, workspace: Any, *, backend: str = "fa2"
) -> Attend:
    """With real page sizes and our plans; SGLang plans token by token instead, and always for
    FlashInfer's own kernels, ``fa2``. ``fa3`` are its kernels for Hopper, prefill ones alone."""
    import flashinfer

    plan = batch.plan(group.window)
    arrays = [
        on(device, array, torch.int32) for array in (plan.indptr, plan.indices, plan.last_page_len)
    ]
    heads = (group.num_q_heads, group.num_kv_heads, group.dim, batch.page_size)
    options = {
        "window_left": -1 if group.window is None else group.window - 1,
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.bfloat16,
    }
    if backend == "fa2" and (batch.q_lens == 1).all():
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            # SGLang's rule: from four query heads per KV head on.
            use_tensor_cores=group.num_q_heads // group.num_kv_heads >= 4,
        )
        wrapper.plan(*arrays, *heads, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        q_indptr = on(device, batch.q_indptr, torch.int32)
        wrapper.plan(q_indptr, *arrays, *heads, causal=True, **options)
    return lambda q, kv: wrapper.run(q, tuple(kv))


# ---- FlashAttention 3 -----------------------------------------------------------------------


def prepare_fa3(batch: Batch, group: Attention, device: str) -> Attend:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    table = on(device, batch.table, torch.int32)
    kv_lens = on(device, batch.kv_lens, torch.int32)
    q_indptr = on(device, batch.q_indptr, torch.int32)
    longest = int(batch.q_lens.max())
    window = (-1, -1) if group.window is None else (group.window - 1, 0)

    def attend(q: torch.Tensor, kv: PagedKV) -> torch.Tensor:
        return flash_attn_with_kvcache(
            q=q,
            k_cache=kv.k,
            v_cache=kv.v,
            page_table=table,
            cache_seqlens=kv_lens,
            cu_seqlens_q=q_indptr,
            max_seqlen_q=longest,
            softmax_scale=group.dim**-0.5,
            causal=True,
            window_size=window,
        )

    return attend


# ---- what this machine has ------------------------------------------------------------------


def missing(kernel: str) -> str | None:
    """Why a kernel cannot run here, or None if it can."""
    capability = torch.cuda.get_device_capability()
    if kernel == "flashinfer-fa3" and capability != (9, 0):
        return f"is for compute capability 9.0, not {capability[0]}.{capability[1]}"
    if kernel == "fa3" and capability[0] not in (8, 9):
        return f"has no build for compute capability {capability[0]}.{capability[1]}"
    try:
        if kernel == "triton":
            triton_ops()
        else:
            importlib.import_module("sgl_kernel.flash_attn" if kernel == "fa3" else "flashinfer")
    except ImportError as cause:
        return f"cannot be imported: {str(cause).strip().splitlines()[0]}"
    return None


def prepare(kernel: str, batch: Batch, group: Attention, device: str, workspace: Any) -> Attend:
    if kernel == "triton":
        return prepare_triton(batch, group, device, triton_ops())
    if kernel == "fa3":
        return prepare_fa3(batch, group, device)
    backend = "fa3" if kernel == "flashinfer-fa3" else "fa2"
    return prepare_flashinfer(batch, group, device, workspace, backend=backend)


KERNELS = ("triton", "flashinfer", "flashinfer-fa3", "fa3")
