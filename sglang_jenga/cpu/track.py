"""Snapshots of states while requests decode, in plain torch.

With SGLang's strategy ``extra_buffer`` a request owns one or two spare slots, and its state is
copied there whenever its length crosses the tracking interval; what is cached is the copy.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def _tracked_slots(sources: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative slots belong to requests whose state was freed meanwhile: nothing to copy."""
    live = mask.bool() & (sources >= 0) & (targets >= 0)
    return sources[live].long(), targets[live].long()


def track_mamba_states_if_needed(
    conv_states: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy one layer's states, ``[num_slots, ...]``, of the requests whose mask is set from slot
    ``cache_indices[i]`` to slot ``mamba_track_indices[i]``."""
    rows = slice(batch_size)
    sources, targets = _tracked_slots(
        cache_indices[rows], mamba_track_mask[rows], mamba_track_indices[rows]
    )
    for states in (conv_states, ssm_states):
        states[targets] = states[sources]


def track_mamba_states_all_layers(
    conv_states_pool: Tensor,
    ssm_states_pool: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """The same for pools ``[layers, num_slots, ...]``."""
    for conv_states, ssm_states in zip(conv_states_pool, ssm_states_pool, strict=True):
        track_mamba_states_if_needed(
            conv_states,
            ssm_states,
            cache_indices,
            mamba_track_mask,
            mamba_track_indices,
            batch_size,
        )
