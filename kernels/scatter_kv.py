"""Store K and V of a step's tokens into their slots: strided views of the pool, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_jenga.kernels.launch import (
    INDEX,
    RAW,
    can_launch,
    check_range,
    check_tensor,
    device_of,
    raw,
)

MAX_BLOCK = 1024  # elements of a row per program


@triton.jit
def _store_row(
    source,
    pool,
    token,
    slot,
    source_token,
    source_head,
    pool_slot,
    pool_head,
    column,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    head, lane = (column // DIM).to(tl.int64), column % DIM
    inside = column < HEADS * DIM
    value = tl.load(source + token * source_token + head * source_head + lane, mask=inside)
    tl.store(pool + slot * pool_slot + head * pool_head + lane, value, mask=inside)


@triton.jit
def _scatter_kernel(
    k,
    v,
    loc,
    k_pool,
    v_pool,
    k_token,
    k_head,
    v_token,
    v_head,
    k_pool_slot,
    k_pool_head,
    v_pool_slot,
    v_pool_head,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(loc + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _store_row(
        k, k_pool, token, slot, k_token, k_head, k_pool_slot, k_pool_head, column, HEADS, K_DIM
    )
    _store_row(
        v, v_pool, token, slot, v_token, v_head, v_pool_slot, v_pool_head, column, HEADS, V_DIM
    )


def scatter_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    loc: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """Store row i of ``k`` and ``v`` into slot ``loc[i]`` of the pools, bit by bit.

    Every row is written, that of the null slot too; of rows with the same slot any may stay.

    Args:
        k: shape [num_tokens, num_heads, k_dim], any type; a token's or a head's stride may be
            anything, as in a slice of a fused projection, an element's is 1.
        v: shape [num_tokens, num_heads, v_dim].
        loc: slots, shape [num_tokens], int64 or int32.
        k_pool: shape [num_slots, num_heads, k_dim], of k's type, or uint8, int16, int32 or
            int64 of its width (SGLang's pools keep fp8 as uint8); strides as for ``k``.
        v_pool: shape [num_slots, num_heads, v_dim].

    Raises:
        ValueError: a wrong shape, dtype, stride or device; in host memory also a slot outside the
            pool.
    """
    _check("k", k, k_pool, loc)
    _check("v", v, v_pool, loc)
    if k.shape[1] != v.shape[1] or k_pool.shape[0] != v_pool.shape[0]:
        raise ValueError(
            f"v: expected {k.shape[1]} heads and {k_pool.shape[0]} slots as k, got {v.shape[1]} "
            f"and {v_pool.shape[0]}"
        )
    check_range("loc", loc, k_pool.shape[0])
    num_tokens, num_heads, k_dim = k.shape
    width = num_heads * max(k_dim, v.shape[2])
    if not num_tokens:
        return
    if not can_launch(_scatter_kernel, k_pool):
        scatter_kv_reference(k, v, loc, k_pool, v_pool)
        return
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    with device_of(k_pool):
        _scatter_kernel[(num_tokens, triton.cdiv(width, block))](
            raw(k),
            raw(v),
            loc.contiguous(),
            raw(k_pool),
            raw(v_pool),
            *k.stride()[:2],
            *v.stride()[:2],
            *k_pool.stride()[:2],
            *v_pool.stride()[:2],
            HEADS=num_heads,
            K_DIM=k_dim,
            V_DIM=v.shape[2],
            BLOCK=block,
        )


def scatter_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    loc: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """``scatter_kv`` in plain torch."""
    raw(k_pool)[loc.long()] = raw(k)
    raw(v_pool)[loc.long()] = raw(v)


def _check(name: str, rows: torch.Tensor, pool: torch.Tensor, loc: torch.Tensor) -> None:
    """Check K or V against its pool."""
    if pool.element_size() not in RAW or pool.is_complex():
        raise ValueError(f"{name}_pool: no kernel moves {pool.dtype}")
    check_tensor(f"{name}_pool", pool, (pool.dtype,), (None, None, None))
    check_tensor("loc", loc, INDEX, (None,), pool.device)
    dtypes = (pool.dtype,)
    if pool.dtype == RAW[pool.element_size()] and rows.element_size() == pool.element_size():
        dtypes = (rows.dtype,)
    check_tensor(name, rows, dtypes, (loc.shape[0], *pool.shape[1:]), pool.device)
    if not pool.shape[1] or not pool.shape[2]:
        raise ValueError(f"{name}_pool: expected heads and elements, got {list(pool.shape)}")
    for label, tensor in ((name, rows), (f"{name}_pool", pool)):
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(
                f"{label}: expected stride 1 in the last dimension, got {tensor.stride(2)}"
            )
