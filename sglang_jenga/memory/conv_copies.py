"""SGLang's kernels of short convolutions that count where a state lies in 32 bits.

Slots of ours run over the whole pool, and past 2**31 elements those kernels would read and write
other people's bytes. So they work on copies, ``[requests, dim, width - 1]``, which are copied back:
two small launches more a layer, the same kernels and the same bits as in stock SGLang, and no wait
for the device. Each function here is called in place of SGLang's of the same name, with the same
arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]

PAD = -1
"""Slot of a padded row, where a kernel is not told."""


def causal_conv1d_fwd(
    original: Kernel,
    x: Tensor,
    weight: Tensor,
    bias_: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor | None,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    silu_activation: bool,
    pad_slot_id: int,
) -> Any:
    """Prefill."""
    states = _Copies.of(conv_states, cache_indices, pad_slot_id)
    result = original(
        x,
        weight,
        bias_,
        states.copies,
        query_start_loc,
        states.indices,
        has_initial_state,
        silu_activation,
        pad_slot_id,
    )
    states.copy_back()
    return result


def causal_conv1d_update(
    original: Kernel,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias_: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    pad_slot_id: int,
) -> Any:
    """Decode."""
    states = _Copies.of(conv_state, conv_state_indices, pad_slot_id)
    result = original(
        x,
        states.copies,
        weight,
        bias_,
        silu_activation,
        cache_seqlens,
        states.indices,
        pad_slot_id,
    )
    states.copy_back()
    return result


def fused_lfm_short_conv_prefill(
    original: Kernel,
    b: Tensor,
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    max_seq_len: int,
) -> Any:
    """Prefill of LFM2-MoE, with its gates."""
    states = _Copies.of(state, cache_indices, PAD)
    result = original(
        b,
        c,
        x,
        weight,
        states.copies,
        query_start_loc,
        states.indices,
        has_initial_state,
        max_seq_len,
    )
    states.copy_back()
    return result


def fused_lfm_short_conv_decode(
    original: Kernel,
    b: Tensor,
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    cache_indices: Tensor,
) -> Any:
    """Decode of LFM2-MoE, with its gates."""
    states = _Copies.of(state, cache_indices, PAD)
    result = original(b, c, x, weight, states.copies, states.indices)
    states.copy_back()
    return result


class _Copies:
    """``copies`` of the states named by ``indices``, and where each belongs."""

    def __init__(self, states: Tensor | None, indices: Tensor | None) -> None:
        self.copies, self.indices = states, indices
        self._home: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, states: Tensor | None, indices: Tensor | None, pad: int) -> _Copies:
        if states is None or indices is None or states.is_contiguous():
            return cls(states, indices)
        # A padded row gets a copy as well, of slot 0, which is nobody's state. The kernel leaves it
        # alone, and back it goes as it was.
        padded = indices == pad
        slots = indices.masked_fill(padded, 0).long()
        order = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
        work = cls(states.index_select(0, slots), order.masked_fill(padded, pad))
        work._home = states, slots
        return work

    def copy_back(self) -> None:
        if self._home is not None:
            states, slots = self._home
            states.index_copy_(0, slots, self.copies)
