"""The gated delta rule (GDN) in plain torch, token by token in float32.

Prefill and decode take the same step, so a token's arithmetic does not depend on how a prompt was
cut or batched. Pools of states are ``[num_slots, value heads, V, K]``, strided or not, and are
updated in place; a negative slot is padding: its output is undefined and nothing is written.
"""

from __future__ import annotations

import torch

from sglang_jenga.cpu.elementwise import sigmoid, softplus
from sglang_jenga.cpu.packed import repeat_heads, spans

Tensor = torch.Tensor
# The chunks on whose edges SGLang looks for states. Fixed by its GPU kernels (FLA), not by us.
CHUNK_TOKENS = 64


def fused_gdn_gating_cpu(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Log decay and write strength of every token and head, ``[1, tokens, heads]`` float32."""
    g = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return g[None], sigmoid(b.float())[None]


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut Qwen3.5's projections ``[tokens, q + k + v + z]`` and ``[tokens, b + a]`` apart.

    Returns ``[tokens, q + k + v]``, ``z`` ``[tokens, HV, V]``, ``b`` and ``a`` ``[tokens, HV]``.
    """
    values = num_heads_v * head_v
    qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + values, values], dim=1)
    b, a = mixed_ba.split(num_heads_v, dim=1)
    z = z.reshape(-1, num_heads_v, head_v)
    return qkv.clone(), z.clone(), b.clone(), a.clone()


def _normalized(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: ``S <- exp(g) S;  S <- S + beta (v - S k) k^T;  o = S q``.

    ``state`` ``[..., heads, V, K]``, ``q``, ``k`` ``[..., heads, K]``, ``v`` ``[..., heads, V]``.
    """
    state = state * decay[..., None, None]
    known = (state * k[..., None, :]).sum(-1)
    state = state + ((v - known) * beta[..., None])[..., None] * k[..., None, :]
    return state, (state * q[..., None, :]).sum(-1)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    pool: Tensor,
    cu_seqlens: Tensor,
    normalize: bool,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    heads = v.shape[2]
    prepare = _normalized if normalize else Tensor.float
    queries = repeat_heads(prepare(q[0]) * q.shape[-1] ** -0.5, heads)
    keys = repeat_heads(prepare(k[0]), heads)
    values, decay, strength = v[0].float(), g[0].float().exp(), beta[0].float()
    out = torch.empty_like(v)
    before_chunks = []
    for index, begin, end in spans(cu_seqlens):
        slot = int(slots[index])
        # A copy: the pool is written below, while the states before the chunks are still held.
        state = pool[max(slot, 0)].to(torch.float32, copy=True)
        for t in range(begin, end):
            if (t - begin) % CHUNK_TOKENS == 0:
                before_chunks.append(state)
            if slot < 0:
                continue
            state, o = _delta_step(state, queries[t], keys[t], values[t], decay[t], strength[t])
            out[0, t] = o.to(out.dtype)
        if slot >= 0:
            pool[slot] = state.to(pool.dtype)
    return out, torch.stack(before_chunks) if before_chunks else pool.new_empty(0, *pool.shape[1:])


def chunk_gated_delta_rule_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Prefill. ``query``, ``key`` ``[1, tokens, heads, K]``, ``value`` ``[1, tokens, HV, V]``,
    ``g``, ``beta`` ``[1, tokens, HV]``, ``initial_state`` ``[num_slots, HV, V, K]``.

    Returns the output ``[1, tokens, HV, V]`` and the pool."""
    assert not head_first
    out, _ = _prefill(
        query, key, value, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel,
        initial_state_indices,
    )  # fmt: skip
    return out, initial_state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same prefill, and the states that the CPU operator has no way to return: a triple whose
    last is ``[1, chunks, HV, V, K]`` float32, the state before each chunk of `CHUNK_TOKENS` tokens
    of every sequence, counted from where this prefill begins, sequence after sequence."""
    assert not head_first
    out, before_chunks = _prefill(
        q, k, v, g, beta, initial_state, cu_seqlens, use_qk_l2norm_in_kernel,
        initial_state_indices,
    )  # fmt: skip
    return out, initial_state, before_chunks[None]


def fused_recurrent_gated_delta_rule_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """Prefill and decode of packed sequences, shapes as in `chunk_gated_delta_rule_cpu`. Updates
    the pool ``initial_state_source`` and returns ``[1, tokens, HV, V]``."""
    out, _ = _prefill(
        q, k, v, g, beta, initial_state_source, cu_seqlens, use_qk_l2norm_in_kernel,
        initial_state_indices,
    )  # fmt: skip
    return out


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> Tensor:
    """Decode, one token per request. Shapes as in `chunk_gated_delta_rule_cpu`; ``a``, ``b``
    ``[requests, HV]``. Returns ``[1, requests, HV, V]``."""
    heads = v.shape[2]
    g, beta = fused_gdn_gating_cpu(A_log, a.reshape(-1, heads), b.reshape(-1, heads), dt_bias)
    prepare = _normalized if use_qk_l2norm_in_kernel else Tensor.float
    queries = repeat_heads(prepare(q[0]) * q.shape[-1] ** -0.5, heads)
    keys = repeat_heads(prepare(k[0]), heads)
    slots = initial_state_indices.long()
    live = slots >= 0
    state, out_live = _delta_step(
        initial_state_source[slots[live]].float(),
        queries[live],
        keys[live],
        v[0][live].float(),
        g[0][live].exp(),
        beta[0][live],
    )
    initial_state_source[slots[live]] = state.to(initial_state_source.dtype)
    out = torch.empty_like(v)
    out[0, live] = out_live.to(out.dtype)
    return out
