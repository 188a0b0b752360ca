"""For mypy alone (`make lint`): folders that may not import each other fit together."""

from __future__ import annotations

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.extent import Extent
from sglang_jenga.radix.node import PageOwner


def as_page_owner(allocator: Allocator) -> PageOwner[Extent]:
    """What `RadixTrees` asks of its owner of pages, the allocator answers."""
    return allocator
