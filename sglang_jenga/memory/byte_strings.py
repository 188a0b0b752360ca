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
        self._runs = buffer.larges
        self._sizes = [run.shape[1] * run.element_size() for run in self._runs]
        self.page_bytes = sum(self._sizes)
        """What a large page takes."""

    def num_larges(self, tensor: torch.Tensor) -> int:
        """Large pages that a tensor takes."""
        return -(-tensor.numel() * tensor.element_size() // self.page_bytes)

    def write(self, large_ids: np.ndarray, tensor: torch.Tensor) -> None:
        """Copy a tensor to `num_larges` large pages, in the order given, int64."""
        ids = self._upload(large_ids)
        flat = tensor.reshape(-1).view(torch.uint8)
        pages = torch.nn.functional.pad(flat, (0, ids.numel() * self.page_bytes - flat.numel()))
        parts = pages.view(ids.numel(), self.page_bytes).split(self._sizes, dim=1)
        for run, part in zip(self._runs, parts, strict=True):
            run.index_copy_(0, ids, part.contiguous().view(run.dtype))

    def read(
        self, large_ids: np.ndarray, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A copy of what was written there."""
        ids = self._upload(large_ids)
        parts = [run.index_select(0, ids).view(torch.uint8) for run in self._runs]
        pages = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        count = torch.Size(shape).numel() * dtype.itemsize
        return pages.view(-1)[:count].view(dtype).view(shape)

    def _upload(self, large_ids: np.ndarray) -> torch.Tensor:
        return self._buffer.ops.upload(torch.from_numpy(large_ids))
