"""How much is cached and how much of it is locked, in the words of SGLang's prefix caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.groups import ServedGroups


class CacheSizes:
    """Mixed into SGLang's base class. Sizes are in tokens, those of states in states. Counters say
    them: nothing is walked."""

    trees: RadixTrees
    core: Allocator
    groups: ServedGroups
    states: Any  # what keeps states, None for models without any
    page_size: int
    disable: bool

    def supports_swa(self) -> bool:
        return bool(self.groups.mapped)

    def supports_mamba(self) -> bool:
        return self.states is not None

    def supports_prefix_sharing(self) -> bool:
        return not self.disable

    @property
    def _protected(self) -> list[int]:
        """Small pages per group that running requests have locked."""
        counts = zip(self.trees.num_pages, self.core.num_cached, strict=True)
        return [pages - cached for pages, cached in counts]

    def _in_rows(self, smalls: Sequence[int]) -> int:
        """Tokens, as rows count them: an encoder's among them."""
        return sum(smalls[group_id] for group_id in self.groups.of_rows) * self.page_size

    def evictable_size(self) -> int:
        return self._in_rows(self.core.num_cached)

    def full_evictable_size(self) -> int:
        return self.evictable_size()

    def swa_evictable_size(self) -> int:
        return self.groups.of_mapped(self.core.num_cached)

    def protected_size(self) -> int:
        return self._in_rows(self._protected)

    def full_protected_size(self) -> int:
        return self.protected_size()

    def swa_protected_size(self) -> int:
        return self.groups.of_mapped(self._protected)

    def mamba_evictable_size(self) -> int:
        """In states."""
        return self.groups.of_states(self.core.num_cached)

    def mamba_protected_size(self) -> int:
        """In states."""
        return self.groups.of_states(self._protected)

    def total_size(self) -> int:
        return self._in_rows(self.trees.num_pages)
