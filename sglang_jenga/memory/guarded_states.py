"""SGLang's recurrent operator of Jet-Nemotron, on the pool's states themselves.

Its kernel takes states any distance apart. The guard before it makes every argument contiguous,
the pool's states too: the kernel would read all of them from a copy, and leave the new ones there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAUNCHER = "fused_recurrent_gated_delta_rule_update_fwd"
"""What the guard leads to, in the operator's module."""


def on_a_gpu() -> bool:
    """The CPU engine has an operator of ours instead."""
    return bool(torch.cuda.is_available())


def fused_recurrent_gated_delta_rule_update(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state_source: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """Called in place of SGLang's of the same name, with the same arguments and the same answer.
    ``initial_state_source`` ``[slots, HV, V, K]`` is updated in place; each slot is one piece."""
    states = initial_state_source
    if states is None or states.is_contiguous():
        return original(q, k, v, g, beta, scale, states, initial_state_indices, cu_seqlens, **more)
    if not states[0].is_contiguous():
        raise ValueError(f"a state is no piece of memory: shape {states.shape}, {states.stride()}")
    # From where the operator has it: the same module, whichever copy of it this is.
    launch: Callable[..., Tensor] = original.__globals__[LAUNCHER]
    return launch(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        g=g.contiguous(),
        beta=torch.ones_like(q[..., 0]) if beta is None else beta.contiguous(),
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state_source=states,
        initial_state_indices=initial_state_indices,
        cu_seqlens=cu_seqlens,
        **more,
    )
