"""Elementwise gates that stand beside the recurrent operators, in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from sglang_jenga.cpu.elementwise import sigmoid, silu

Tensor = torch.Tensor


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
    gate = silu(gate) if activation in ("silu", "swish") else sigmoid(gate)
    return (wide * gate).to(x.dtype)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> Tensor:
    """The same norm under the arguments of SGLang's module `RMSNorm` with a gate ``z``."""
    assert is_rms_norm and norm_before_gate and z is not None and group_size is None
    return rms_norm_gated(x, z, weight, bias, activation, eps)


def fused_gate_sigmoid_mul_add(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Add the shared expert's output, scaled by its gate, to the routed experts' (in place).

    Not a state operator; Qwen3-Next's experts need it beside them."""
    gate = sigmoid((hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True))
    final_hidden_states += (gate * shared_output.float()).to(final_hidden_states.dtype)


def _gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * (1 + weight.float())).to(x.dtype)


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    head_dim: int,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of gated attention (Qwen3.5). ``q_gate`` ``[tokens, heads * 2 * dim]``, each head's
    query before its gate; ``k`` ``[tokens, kv heads * dim]``; a norm's weight is one more than
    written. Returns query, key and gate, ``[tokens * heads, dim]``."""
    q, gate = q_gate.reshape(-1, 2 * head_dim).split(head_dim, dim=1)
    normed = _gemma_norm(q, q_weight, eps), _gemma_norm(k.reshape(-1, head_dim), k_weight, eps)
    return *normed, gate.clone()


def fused_sigmoid_mul_cpu(x: Tensor, gate: Tensor) -> None:
    """Multiply attention's output by its gate (in place)."""
    x *= sigmoid(gate.float()).to(x.dtype)
