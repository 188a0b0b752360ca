"""Short causal convolutions over tokens, in plain torch, and their windows in a pool of states.

A window is a request's last ``width - 1`` inputs. One product after the other in float32: a token's
sum is the same bits however its prompt was cut or batched. `state_operators` says where they are
used.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_jenga.cpu.elementwise import silu
from sglang_jenga.cpu.packed import spans

Tensor = torch.Tensor


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
    """``[..., dim, width - 1 + n]`` tokens to ``[..., dim, n]``, one product after the other, so
    that a token's sum is the same whatever stands beside it."""
    width = weight.shape[1]
    count = window.shape[-1] - width + 1
    total = torch.zeros_like(window[..., :count], dtype=torch.float32)
    for tap in range(width):
        total += window[..., tap : tap + count].float() * weight[:, tap, None].float()
    if bias is not None:
        total += bias[:, None].float()
    return silu(total) if activate else total


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
    for index, begin, end in spans(query_start_loc):
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
    activate = activation in ("silu", "swish")
    return causal_conv1d_fwd_cpu(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activate,
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
    activate = activation in ("silu", "swish")
    return causal_conv1d_update_cpu(
        x, conv_state, weight, bias, activate, cache_seqlens, conv_state_indices, pad_slot_id, False
    )
