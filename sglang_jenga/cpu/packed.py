"""Packed batches: the tokens of all sequences one after another, as SGLang's prefills hold them."""

from __future__ import annotations

import itertools

import torch


def spans(cu_seqlens: torch.Tensor) -> list[tuple[int, int, int]]:
    """``(index, begin, end)`` of every sequence of a packed batch that has tokens."""
    edges = enumerate(itertools.pairwise(cu_seqlens.tolist()))
    return [(index, begin, end) for index, (begin, end) in edges if begin < end]


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[..., groups, dim]`` to ``[..., heads, dim]``: each group serves neighbouring heads."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)
