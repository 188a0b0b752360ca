"""Admission of models with full and window layers: one question to the allocator for all groups."""

from __future__ import annotations

from sglang.srt.mem_cache.prefill_budget import SharedSWAPrefillBudget


class JengaPrefillBudget(SharedSWAPrefillBudget):
    """Admission of hybrid models: one question to the allocator for all groups together."""

    _slid = False

    def _fits(self, full_tokens: float, swa_tokens: float, *, empty_pool: bool = False) -> bool:
        core = self.allocator.core
        if empty_pool:
            return core.fits_empty_pool(self.allocator.need(full_tokens, swa_tokens))
        need = self.allocator.need(full_tokens + self.total_offset, swa_tokens + self.swa_offset)
        if core.fits_after_evicting(need):
            return True
        if self._slid:
            return False
        self._slid = True  # once per admission round is enough
        self.tree_cache.slide(self.allocator.decoding)
        return core.fits_after_evicting(need)
