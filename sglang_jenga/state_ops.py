"""Plain-torch references of the recurrent operators that SGLang's state layers call on a CPU.

GDN (gated delta rule), Mamba-2 and the short causal convolution before them. Every operator runs
token by token in float32, and a token's arithmetic does not depend on how a prompt was cut, batched
or cached: the same tokens give the same bits, which is what parity tests need. Slow, and exact.

Pools of states are ``[num_slots, ...]``, strided or not, and are updated in place at the slots
given. A slot of ``pad_slot_id`` is padding: its output is undefined and nothing is written.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """``(index, begin, end)`` of every sequence of a packed batch that has tokens."""
    edges = cu_seqlens.tolist()
    spans = enumerate(itertools.pairwise(edges))
    return [(index, begin, end) for index, (begin, end) in spans if begin < end]


# ---- causal convolution -------------------------------------------------------------------------


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """``[..., dim, width - 1 + n]`` tokens to ``[..., dim, n]``, one product after the other, so
    that a token's sum is the same whatever stands beside it."""
    width = weight.shape[1]
    count = window.shape[-1] - width + 1
    total = torch.zeros_like(window[..., :count], dtype=torch.float32)
    for tap in range(width):
        total += window[..., tap : tap + count].float() * weight[:, tap, None].float()
    if bias is not None:
        total += bias[:, None].float()
    return F.silu(total) if silu else total


def causal_conv1d_fwd_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor | None,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    silu_activation: bool,
    pad_slot_id: int,
    is_vnni: bool,
) -> Tensor:
    """Prefill. ``x`` ``[dim, tokens]``, sequences one after another; ``weight`` ``[dim, width]``;
    ``conv_states`` ``[num_slots, dim, width - 1]``. Returns ``[dim, tokens]``."""
    if query_start_loc is None:
        query_start_loc = torch.tensor([0, x.shape[1]])
    out = torch.empty_like(x)
    for index, begin, end in _spans(query_start_loc):
        slot = index if cache_indices is None else int(cache_indices[index])
        if slot == pad_slot_id:
            continue
        before = x.new_zeros(x.shape[0], weight.shape[1] - 1)
        if has_initial_state is not None and bool(has_initial_state[index]):
            before = conv_states[slot].to(x.dtype)
        window = torch.cat([before, x[:, begin:end]], dim=1)
        out[:, begin:end] = _convolve(window, weight, bias, silu_activation).to(x.dtype)
        if conv_states is not None:
            conv_states[slot] = window[:, window.shape[1] - before.shape[1] :].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    pad_slot_id: int,
    is_vnni: bool,
) -> Tensor:
    """Decode. ``x`` ``[requests, dim]``, one token each. Returns the same shape."""
    slots = torch.arange(x.shape[0]) if conv_state_indices is None else conv_state_indices.long()
    live = slots != pad_slot_id
    slots = slots[live]
    window = torch.cat([conv_states[slots].to(x.dtype), x[live][:, :, None]], dim=2)
    out = torch.empty_like(x)
    out[live] = _convolve(window, weight, bias, silu_activation)[:, :, 0].to(x.dtype)
    conv_states[slots] = window[:, :, 1:].to(conv_states.dtype)
    return out


# ---- gated delta rule ---------------------------------------------------------------------------


def fused_gdn_gating_cpu(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Log decay and write strength of every token and head, ``[1, tokens, heads]`` float32."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g[None], b.float().sigmoid()[None]


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


def _for_value_heads(x: Tensor, heads: int) -> Tensor:
    """Query and key heads repeated for the value heads that share them."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


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
    heads = value.shape[2]
    scale = query.shape[-1] ** -0.5
    prepare = _normalized if use_qk_l2norm_in_kernel else Tensor.float
    q = _for_value_heads(prepare(query[0]) * scale, heads)
    k = _for_value_heads(prepare(key[0]), heads)
    v, decay, strength = value[0].float(), g[0].float().exp(), beta[0].float()
    out = torch.empty_like(value)
    for index, begin, end in _spans(cu_seqlens):
        slot = int(initial_state_indices[index])
        if slot < 0:
            continue
        state = initial_state[slot].float()
        for t in range(begin, end):
            state, o = _delta_step(state, q[t], k[t], v[t], decay[t], strength[t])
            out[0, t] = o.to(out.dtype)
        initial_state[slot] = state.to(initial_state.dtype)
    return out, initial_state


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
    queries = _for_value_heads(prepare(q[0]) * q.shape[-1] ** -0.5, heads)
    keys = _for_value_heads(prepare(k[0]), heads)
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


# ---- Mamba-2 ------------------------------------------------------------------------------------


def _ssm_step(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: ``S <- exp(dt A) S + dt x B^T;  y = S C + D x``.

    ``state`` ``[..., heads, P, N]``, ``x`` ``[..., heads, P]``, ``dt`` and ``a`` ``[..., heads]``,
    ``b`` and ``c`` ``[..., heads, N]``.
    """
    state = state * (dt * a).exp()[..., None, None]
    state = state + (dt[..., None] * x)[..., None] * b[..., None, :]
    y = (state * c[..., None, :]).sum(-1)
    return state, y if d is None else y + d[..., None] * x


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
    **unused: Any,
) -> tuple[None, Tensor, None]:
    """Prefill of packed sequences. ``x`` ``[1, tokens, heads, P]``, ``dt`` ``[1, tokens, heads]``,
    ``B``, ``C`` ``[1, tokens, groups, N]``, ``initial_states`` ``[sequences, heads, P, N]``.

    Writes ``out`` and returns the state after every sequence in the middle of a triple, where
    SGLang looks for it; it keeps no states in between.
    """
    assert z is None and cu_seqlens is not None and out is not None
    heads, dim = x.shape[2:]
    delta = dt[0].float() + (0 if dt_bias is None else dt_bias.float())
    delta = F.softplus(delta) if dt_softplus else delta
    b, c = (_for_value_heads(part[0].float(), heads) for part in (B, C))
    shape = (cu_seqlens.numel() - 1, heads, dim, B.shape[-1])
    finals = torch.zeros(shape, dtype=state_dtype or x.dtype)
    skip = None if D is None else D.float()
    for index, begin, end in _spans(cu_seqlens):
        state = torch.zeros(shape[1:])
        if initial_states is not None:
            state = initial_states[index].float()
        for t in range(begin, end):
            state, y = _ssm_step(state, x[0, t].float(), delta[t], A.float(), b[t], c[t], skip)
            out[0, t] = y.to(out.dtype)
        finals[index] = state.to(finals.dtype)
    return None, finals, None


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
    """Decode, one token per request. ``state`` ``[num_slots, heads, P, N]``, ``x`` and ``dt``
    ``[requests, heads, P]``, ``A`` ``[heads, P, N]``, ``D`` and ``dt_bias`` ``[heads, P]``.

    Mamba-2 repeats ``dt``, ``A``, ``D`` and ``dt_bias`` over the last dimensions. Writes ``out``.
    """
    assert z is None and out is not None
    heads = x.shape[1]
    slots = torch.arange(x.shape[0]) if state_batch_indices is None else state_batch_indices.long()
    live = slots != pad_slot_id
    slots = slots[live]
    delta = dt[live, :, 0].float() + (0 if dt_bias is None else dt_bias[:, 0].float())
    new, y = _ssm_step(
        state[slots].float(),
        x[live].float(),
        F.softplus(delta) if dt_softplus else delta,
        A[:, 0, 0].float(),
        _for_value_heads(B[live].float(), heads),
        _for_value_heads(C[live].float(), heads),
        None if D is None else D[:, 0].float(),
    )
    state[slots] = new.to(state.dtype)
    out[live] = y.view(out[live].shape).to(out.dtype)


# ---- the same as SGLang's functions -------------------------------------------------------------


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    conv_states: Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = -1,
    **unused: Any,
) -> Tensor:
    silu = activation in ("silu", "swish")
    return causal_conv1d_fwd_cpu(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, silu,
        pad_slot_id, False,
    )  # fmt: skip


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
) -> Tensor:
    silu = activation in ("silu", "swish")
    return causal_conv1d_update_cpu(
        x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, pad_slot_id, False
    )


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-6,
    **unused: Any,
) -> Tensor:
    """``norm(x) * weight * activation(g)`` over the last dimension (gated output norm of GDN)."""
    assert bias is None
    wide, gate = x.float(), g.float()
    wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    wide = wide if weight is None else wide * weight.float()
    gate = F.silu(gate) if activation in ("silu", "swish") else gate.sigmoid()
    return (wide * gate).to(x.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Add the shared expert's output, scaled by its gate, to the routed experts' (in place).

    Not a state operator; Qwen3-Next's experts need it beside them."""
    gate = (hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True).sigmoid()
    final_hidden_states += (gate * shared_output.float()).to(final_hidden_states.dtype)


OPERATORS: dict[str, tuple[str, Callable]] = {
    "causal_conv1d_fwd_cpu": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor? query_start_loc,"
        " Tensor? cache_indices, Tensor? has_initial_state, bool silu_activation, int pad_slot_id,"
        " bool is_vnni) -> Tensor",
        causal_conv1d_fwd_cpu,
    ),
    "causal_conv1d_update_cpu": (
        "(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool silu_activation,"
        " Tensor? cache_seqlens, Tensor? conv_state_indices, int pad_slot_id, bool is_vnni)"
        " -> Tensor",
        causal_conv1d_update_cpu,
    ),
    "chunk_gated_delta_rule_cpu": (
        "(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor(a!) initial_state,"
        " bool output_final_state, Tensor cu_seqlens, bool head_first,"
        " bool use_qk_l2norm_in_kernel, Tensor initial_state_indices) -> (Tensor, Tensor(a!))",
        chunk_gated_delta_rule_cpu,
    ),
    "fused_gdn_gating_cpu": (
        "(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)",
        fused_gdn_gating_cpu,
    ),
    "fused_sigmoid_gating_delta_rule_update_cpu": (
        "(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b,"
        " Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens,"
        " bool use_qk_l2norm_in_kernel, float softplus_beta=1.0, float softplus_threshold=20.0)"
        " -> Tensor",
        fused_sigmoid_gating_delta_rule_update_cpu,
    ),
}


def install() -> None:
    """Put the references where SGLang's state models import kernels that need a GPU.

    For scheduler processes of the CPU engine. SGLang binds nothing at all to some of these names on
    a CPU; a model's module that was imported earlier holds the originals, and is put right too.
    """
    from sglang.kernels.ops.attention.fla import fused_norm_gate
    from sglang.srt.layers.attention.mamba import causal_conv1d, mamba

    fused_norm_gate.rms_norm_gated = rms_norm_gated
    mamba.causal_conv1d_fn = mamba.causal_conv1d_fn_triton = causal_conv1d_fn
    mamba.causal_conv1d_update = mamba.causal_conv1d_update_triton = causal_conv1d_update
    models = [
        module for name, module in sys.modules.items() if name.startswith("sglang.srt.models.")
    ]
    elementwise = importlib.import_module("sglang.kernels.ops.elementwise.elementwise")
    for module in (causal_conv1d, mamba, elementwise, *models):
        for function in (
            causal_conv1d_fn,
            causal_conv1d_update,
            mamba_chunk_scan_combined,
            selective_state_update,
            fused_gate_sigmoid_mul_add,
        ):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
    _stay_on_the_cpu()


def _stay_on_the_cpu() -> None:
    """A CUDA build of torch names CUDA as its device module even where there is no GPU, and the
    Qwen3-Next layers ask that module for the current device."""
    original = torch.get_device_module

    def get_device_module(device: Any = None) -> Any:
        return torch.cpu if device is None else original(device)

    if not torch.cuda.is_available():
        torch.get_device_module = get_device_module
