"""Where one layer's K and V lie in a pool: the three layouts that attention is timed on.

    contiguous   each layer has a K and a V buffer of its own, as in stock SGLang
    token-major  ours: an entry is a token's K and V of every layer, [slot][layer][K|V][head][dim]
    page-layer   a small page is contiguous per layer, [page][layer][K|V][token][head][dim]

All three are views [page, token, head, dim] of one buffer with different page and token strides;
paged kernels that take both follow any of them. Only in the first two does a slot's address depend
on its id alone, so that they are also views [slot, head, dim], which is what SGLang's pools hold.
With one token per page, page-layer is token-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

LAYOUTS = ("contiguous", "token-major", "page-layer")


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer group of a model: its heads, how many layers share an entry, and its window.

    ``window`` counts the tokens a query sees, its own included; None for full attention.
    """

    model: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    dim: int
    window: int | None = None

    @property
    def label(self) -> str:
        return self.model if self.window is None else f"{self.model} window {self.window}"

    @property
    def row(self) -> int:
        """Elements of K, or of V, of one token in one layer."""
        return self.num_kv_heads * self.dim

    @property
    def entry(self) -> int:
        """Elements of one token over all layers."""
        return 2 * self.num_layers * self.row


# From the models' configurations on Hugging Face. gpt-oss's sinks are left out: they are a term of
# the softmax and read no memory.
GROUPS = (
    Attention("Llama-3.1-8B", 32, 32, 8, 128),
    Attention("Gemma-3-27B", 10, 32, 16, 128),
    Attention("Gemma-3-27B", 52, 32, 16, 128, window=1024),
    Attention("gpt-oss-20b", 12, 64, 8, 64),
    Attention("gpt-oss-20b", 12, 64, 8, 64, window=128),
    Attention("Qwen3-Next-80B", 12, 16, 2, 256),
)


class PagedKV(NamedTuple):
    """K and V of one layer, ``[num_pages, page_size, num_kv_heads, dim]``, of equal strides."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def has_rows(self) -> bool:
        """Whether a slot's address is affine in its id."""
        pages, tokens = self.k.stride()[:2]
        return pages == tokens * self.k.shape[1]

    def rows(self) -> PagedKV:
        """The same as ``[num_slots, num_kv_heads, dim]``, what SGLang's pools hold."""
        if not self.has_rows:
            raise ValueError(f"no view by slot of strides {self.k.stride()}")
        num_pages, page_size, heads, dim = self.k.shape
        shape, stride = (num_pages * page_size, heads, dim), self.k.stride()[1:]
        return PagedKV(*(part.as_strided(shape, stride) for part in self))


def buffer_elements(layout: str, group: Attention, num_pages: int, page_size: int) -> int:
    """Elements of the buffer that ``layer_pages`` cuts; contiguous takes one layer's alone."""
    per_token = 2 * group.row if layout == "contiguous" else group.entry
    return num_pages * page_size * per_token


def layer_pages(
    layout: str, buffer: torch.Tensor, group: Attention, layer: int, num_pages: int, page_size: int
) -> PagedKV:
    """Views of one layer in ``buffer``, 1-D, at least ``buffer_elements`` long.

    Raises:
        ValueError: no such layout or layer, or too short a buffer.
    """
    if layout not in LAYOUTS or not 0 <= layer < group.num_layers:
        raise ValueError(f"expected one of {LAYOUTS} and a layer of {group}, got {layout}, {layer}")
    need = buffer_elements(layout, group, num_pages, page_size)
    if buffer.dim() != 1 or buffer.numel() < need:
        raise ValueError(f"buffer: expected [{need}] or more, got {list(buffer.shape)}")
    if layout == "contiguous":
        token, page = group.row, group.row * page_size
        first, second = 0, num_pages * page
    elif layout == "token-major":
        token, page = group.entry, group.entry * page_size
        first = 2 * layer * group.row
        second = first + group.row
    else:
        # A lone token of a page has no next one; its slot's stride is then the page's.
        token = group.row if page_size > 1 else group.entry
        page = group.entry * page_size
        first = 2 * layer * group.row * page_size
        second = first + group.row * page_size
    shape = (num_pages, page_size, group.num_kv_heads, group.dim)
    stride = (page, token, group.dim, 1)
    offset = buffer.storage_offset()
    return PagedKV(*(buffer.as_strided(shape, stride, offset + at) for at in (first, second)))
