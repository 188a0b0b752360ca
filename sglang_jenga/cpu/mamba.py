"""The recurrences of Mamba-2, and of Mamba-1's decodes, in plain torch, by token in float32.

Prefill and decode take the same step, so a token's arithmetic does not depend on how a prompt was
cut or batched. A decode updates the pool ``[num_slots, heads, P, N]`` in place, strided or not; a
prefill is given its initial states and returns the last ones, as SGLang's kernel does. Mamba-1
prefills in plain torch in SGLang itself.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_jenga.cpu.elementwise import silu, softplus
from sglang_jenga.cpu.packed import repeat_heads, spans

Tensor = torch.Tensor


def _ssm_step(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: ``S <- exp(dt A) S + dt x B^T;  y = S C + D x``.

    ``state`` ``[..., heads, P, N]``, ``x`` ``[..., heads, P]``, ``b`` and ``c``
    ``[..., heads, N]``. ``dt`` and ``d`` are as ``x`` and ``a`` is as one state; where Mamba-2 has
    one number per head, the last dimensions may be 1.
    """
    state = state * (dt[..., None] * a).exp()
    state = state + (dt * x)[..., None] * b[..., None, :]
    y = (state * c[..., None, :]).sum(-1)
    return state, y if d is None else y + d * x


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    out: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    track_seq_idx: Tensor | None = None,
    track_end_locs: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prefill of packed sequences. ``x`` ``[1, tokens, heads, P]``, ``dt`` ``[1, tokens, heads]``,
    ``B``, ``C`` ``[1, tokens, groups, N]``, ``initial_states`` ``[sequences, heads, P, N]``.

    Writes ``out`` and returns three times states ``[heads, P, N]``: ``[1, chunks, ...]`` before
    each chunk of the whole batch (a chunk may begin in the middle of a sequence, or hold several),
    ``[sequences, ...]`` after every sequence, and ``[1, tracked, ...]`` before the tokens
    ``track_end_locs`` of the batch, which lie in the sequences ``track_seq_idx``; None without.
    """
    assert z is None and cu_seqlens is not None and out is not None
    heads, dim = x.shape[2:]
    delta = dt[0].float() + (0 if dt_bias is None else dt_bias.float())
    delta = softplus(delta) if dt_softplus else delta
    b, c = (repeat_heads(part[0].float(), heads) for part in (B, C))
    shape = (heads, dim, B.shape[-1])
    dtype = state_dtype or x.dtype
    finals = torch.zeros((cu_seqlens.numel() - 1, *shape), dtype=dtype)
    before_chunks = torch.zeros((1, -(-x.shape[1] // chunk_size), *shape), dtype=dtype)
    tracked, wanted = None, {}
    if track_end_locs is not None and track_end_locs.numel():
        tracked = torch.zeros((1, track_end_locs.numel(), *shape), dtype=dtype)
        pairs = zip(track_seq_idx.tolist(), track_end_locs.tolist(), strict=True)
        wanted = {pair: row for row, pair in enumerate(pairs)}
    delta, a = delta[..., None], A.float()[:, None, None]
    skip = None if D is None else D.float()[:, None]
    for index, begin, end in spans(cu_seqlens):
        state = torch.zeros(shape)
        if initial_states is not None:
            state = initial_states[index].float()
        for t in range(begin, end):
            if t % chunk_size == 0:
                before_chunks[0, t // chunk_size] = state.to(dtype)
            if (index, t) in wanted:
                tracked[0, wanted[index, t]] = state.to(dtype)
            state, y = _ssm_step(state, x[0, t].float(), delta[t], a, b[t], c[t], skip)
            out[0, t] = y.to(out.dtype)
        finals[index] = state.to(dtype)
    return before_chunks, finals, tracked


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    **unused: Any,
) -> None:
    """Decode, one token per request. ``state`` ``[num_slots, heads, P, N]``, ``x``, ``dt`` and the
    gate ``z`` ``[requests, heads, P]``, ``A`` ``[heads, P, N]``, ``D`` and ``dt_bias``
    ``[heads, P]``, ``B`` and ``C`` ``[requests, groups, N]``.

    Mamba-2 repeats ``dt``, ``A``, ``D`` and ``dt_bias`` over the last dimensions; Mamba-1 has a
    head per channel, ``P`` 1. Writes ``out``, times ``silu(z)`` if there is a gate.
    """
    assert out is not None
    heads = x.shape[1]
    slots = torch.arange(x.shape[0]) if state_batch_indices is None else state_batch_indices.long()
    live = slots != pad_slot_id
    slots = slots[live]
    delta = dt[live].float() + (0 if dt_bias is None else dt_bias.float())
    new, y = _ssm_step(
        state[slots].float(),
        x[live].float(),
        softplus(delta) if dt_softplus else delta,
        A.float(),
        repeat_heads(B[live].float(), heads),
        repeat_heads(C[live].float(), heads),
        None if D is None else D.float(),
    )
    state[slots] = new.to(state.dtype)
    y = y if z is None else y * silu(z[live].float())
    out[live] = y.view(out[live].shape).to(out.dtype)
