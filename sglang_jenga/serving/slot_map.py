"""Which window slot stands beside every full slot: the host's record, and the kernels' copy of it.

Row slots are full slots. A kernel of a window layer finds the KV of a token through
``full_to_swa_index_mapping``, one tensor for life, since CUDA graphs capture it. The record says
for every full page in use:

    window_page[full page] == the window page that holds the same tokens, or 0, the null page

Whoever changes which window page stands beside a full page says so here: an allocation, a slide, a
hole in the trees that a request fills, an eviction. `upload` brings the tensor up to date. It comes
with every allocation, so no step runs on an old one. What the record says of a full page that
nobody holds means nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sglang_jenga.pages.tables import expand


class SlotMap:
    """``tensor``: int64 ``[num_slots + 1]`` on the device, from full slots to window slots."""

    def __init__(
        self,
        num_full_pages: int,
        tokens_per_page: int,
        device: str,
        to_device: Callable[[np.ndarray], torch.Tensor],
    ) -> None:
        """``to_device``: copies an array there without waiting for the device."""
        self.window_page = np.zeros(num_full_pages, dtype=np.int64)
        self._tokens_per_page = tokens_per_page
        self._to_device = to_device
        self.pending: list[np.ndarray] = []
        """Full pages whose partners have changed since the last `upload`."""
        # SGLang looks up -1 for "no previous slot" and expects -1.
        self.tensor = torch.zeros(
            num_full_pages * tokens_per_page + 1, dtype=torch.int64, device=device
        )
        self.tensor[-1] = -1

    def pair(self, full_pages: np.ndarray, window_pages: np.ndarray) -> None:
        """These full pages have those window pages beside them from now on."""
        if not np.array_equal(self.window_page[full_pages], window_pages):
            self.window_page[full_pages] = window_pages
            self.pending.append(full_pages)

    def part(self, full_pages: np.ndarray) -> None:
        """The window pages beside these full pages have gone."""
        self.pair(full_pages, np.zeros_like(full_pages))

    def upload(self, beside: np.ndarray | None = None) -> torch.Tensor | None:
        """Bring the tensor up to date; ``beside``: int64, copied to the device along with it and
        returned there, since every copy costs microseconds of host time."""
        changed, self.pending = self.pending, []
        if not changed:
            return None if beside is None else self._to_device(beside)
        pages = np.concatenate(changed)
        full = expand(pages, self._tokens_per_page)
        window = expand(self.window_page[pages], self._tokens_per_page)
        head = 0 if beside is None else beside.size
        parts = (full, window) if beside is None else (beside, full, window)
        sent = self._to_device(np.concatenate(parts))
        self.tensor[sent[head : head + full.size]] = sent[head + full.size :]
        return sent[:head]

    def check(self, full_pages: np.ndarray, window_pages: np.ndarray) -> None:
        """The record, and the tensor once everything is uploaded, say exactly this."""
        said = self.window_page[full_pages]
        for full, window, expected in zip(full_pages, said, window_pages, strict=True):
            assert window == expected, (
                f"the record leads full page {full} to window page {window}, not to {expected}"
            )
        self.upload()
        slots = expand(full_pages, self._tokens_per_page)
        found = self.tensor[torch.from_numpy(slots).to(self.tensor.device)].cpu().numpy()
        wrong = found != expand(window_pages, self._tokens_per_page)
        assert not wrong.any(), (
            f"the map leads full slot {slots[wrong][0]} to window slot {found[wrong][0]}"
        )
