"""What two servers must agree on before one writes into the other's pool, in one word."""

from __future__ import annotations

import hashlib

from sglang_jenga.plan.spec import PoolPlan

PREFIX = "jenga-"


def layout_name(plan: PoolPlan, num_ranks: int) -> str:
    """Equal where small page ``i`` of every group begins at the same byte and holds the same layers
    in the same format. How many large pages there are, and how large they are, does not matter.

    ``num_ranks``: among how many the heads are dealt. Pages are sent whole, so it must be the same.
    """
    groups = [
        (
            item.group.label,
            item.group.layer_ids,
            item.group.entry_bytes,
            item.padded_entry_bytes,
            item.group.element,
        )
        for item in plan.groups
    ]
    digest = hashlib.sha256(repr(groups).encode()).hexdigest()[:12]
    return f"{PREFIX}{digest}-page{plan.tokens_per_page}-tp{num_ranks}"
