"""Tensors of any shape and type in whole large pages, as strings of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_jenga.memory.buffer import PoolBuffer


class ByteStrings:
    """Writes and reads on the current stream, and never makes the host wait.

    A tensor's bytes fill large pages one after another; what is left of the last page is zero.
    """

    def __init__(self, buffer: PoolBuffer) -> None:
        self._buffer = buffer
        self._views = buffer.larges
        self._sizes: list[int] = [view[0].numel() * view.element_size() for view in self._views]
        self.page_bytes: int = sum(self._sizes)
        """What a large page takes."""

    def num_larges(self, tensor: torch.Tensor) -> int:
        """Large pages that a tensor takes, one at least."""
        num_bytes: int = tensor.nbytes
        return max(1, -(-num_bytes // self.page_bytes))

    def write(self, large_ids: np.ndarray, tensor: torch.Tensor) -> None:
        """Copy a tensor to `num_larges` large pages, in the order given, int64."""
        ids = self._upload(large_ids)
        flat = tensor.reshape(-1).view(torch.uint8)
        pages = torch.nn.functional.pad(flat, (0, ids.numel() * self.page_bytes - flat.numel()))
        parts = pages.view(ids.numel(), self.page_bytes).split(self._sizes, dim=1)
        for view, part in zip(self._views, parts, strict=True):
            # A clone, for a part begins anywhere and words do not.
            rows = part.clone(memory_format=torch.contiguous_format).view(view.dtype)
            view.index_copy_(0, ids, rows.view(-1, *view.shape[1:]))

    def read(self, large_ids: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A copy of what was written there."""
        ids = self._upload(large_ids)
        parts = [view.index_select(0, ids).flatten(1).view(torch.uint8) for view in self._views]
        pages = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        count = torch.Size(shape).numel() * dtype.itemsize
        used = pages.view(-1)[:count]
        if 2 * count < pages.numel():
            used = used.clone()  # what is returned would keep a large page's bytes alive
        return used.view(dtype).view(shape)

    def _upload(self, large_ids: np.ndarray) -> torch.Tensor:
        return self._buffer.ops.upload(torch.from_numpy(large_ids))
