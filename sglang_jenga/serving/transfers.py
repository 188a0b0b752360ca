"""Between a prefill server and a decode server: whom they trust, and room for what comes.

SGLang's own code sends the pages. A prefill server allocates as any server does. A decode server
allocates here, for a prompt that another server has computed, and keeps no cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.runtime_context import get_parallel

from sglang_jenga.layers.base import Load
from sglang_jenga.memory.kv import JengaSWAPool
from sglang_jenga.memory.layout import PREFIX, layout_name
from sglang_jenga.pages.tables import StepDemand
from sglang_jenga.serving.allocator import is_ours

logger = logging.getLogger(__name__)
_told: set[str] = set()
"""Refusals that have been logged; SGLang tries each request a dozen times."""

# ---- two servers meet -----------------------------------------------------------------------


def kv_layer_ids(result: list[int], *, token_to_kv_pool: Any, **_: Any) -> list[int]:
    """SGLang asks pools of full attention and states alone."""
    ours = isinstance(token_to_kv_pool, JengaSWAPool)
    return token_to_kv_pool.get_kv_layer_ids() if ours else result


def kv_layout(result: str | None, token_to_kv_pool: Any) -> str | None:
    """What a prefill server tells of its pool to decode servers that ask."""
    pool = getattr(token_to_kv_pool, "full_kv_pool", token_to_kv_pool)
    buffer = getattr(pool, "_buffer", None)
    if buffer is None:
        return result
    return layout_name(buffer.plan, get_parallel().attn_tp_size)


def meet(original: Callable[..., bool], self: CommonKVManager, bootstrap_addr: str) -> bool:
    """A decode server asks a prefill server how its pages lie. SGLang's ends with all its requests
    where another page size or number format comes back; here only those fail that were sent there.
    """
    own = self.kv_layout
    if own is None or not own.startswith(PREFIX):
        return original(self, bootstrap_addr)
    known = bootstrap_addr in self.prefill_info_table
    reason = None
    try:
        if not original(self, bootstrap_addr):
            return False
        found = self.prefill_info_table[bootstrap_addr].kv_layout
        if not known and found != own:
            reason = f"its pool is {found or 'not of --memory-backend jenga'}, here it is {own}"
    except RuntimeError as error:
        reason = str(error)
    if reason is None:
        return True
    self.prefill_info_table.pop(bootstrap_addr, None)
    line = f"jenga takes nothing from the prefill server {bootstrap_addr}: {reason}"
    if line not in _told:
        _told.add(line)
        logger.error(line)
    return False


def check_peer(
    original: Callable[..., tuple[bool, str | None]], self: CommonKVManager, registration_info: Any
) -> tuple[bool, str | None]:
    """A decode server registers with a prefill server. SGLang compares layouts where the decode
    side asks; stock's does not, and would be written to by our pages' lengths."""
    own, found = self.kv_args, registration_info
    if self.kv_layout is None or not self.kv_layout.startswith(PREFIX):
        return original(self, registration_info)
    pairs = {
        "regions": (len(own.kv_data_ptrs), len(found.dst_kv_ptrs)),
        "layers": (list(own.kv_layer_ids), list(found.dst_kv_layer_ids)),
        "bytes of items": (_first(own.kv_item_lens), found.dst_kv_item_len),
        "bytes of windows or states": (_lists(own.state_item_lens), found.dst_state_item_lens),
        "ranks": (self.attn_tp_size, found.dst_attn_tp_size),
    }
    wrong = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        return False, f"jenga sends nothing to a decode server of other {', '.join(wrong)}"
    return original(self, registration_info)


def _first(lengths: Sequence[int]) -> int:
    return lengths[0] if lengths else 0


def _lists(lengths: Any) -> list[list[int]]:
    return [list(of_one) for of_one in lengths]


# ---- room on the decode server --------------------------------------------------------------


def uses_window_tails(result: bool, self: Any) -> bool:
    """SGLang allocates the tails of windows apart from the rest, where pages have several tokens.
    Here they come with the rest, whatever the pages."""
    return result and not is_ours(self.token_to_kv_pool_allocator)


def reservation_fits(
    original: Callable[..., bool],
    self: Any,
    full_tokens: int,
    swa_tokens: int,
    *,
    full_allocatable_tokens: int,
    swa_allocatable_tokens: int | None,
) -> bool:
    """Whether a prompt may come: it and its answer so far as SGLang counts it, beside what SGLang
    keeps for the answers of others; asked of all groups together.

    SGLang sets tokens aside for every active request, of the row's group. Of a sliding group no
    request takes more than its window, whatever it holds of it already.
    """
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(
            self,
            full_tokens,
            swa_tokens,
            full_allocatable_tokens=full_allocatable_tokens,
            swa_allocatable_tokens=swa_allocatable_tokens,
        )
    set_aside = max(0, allocator.available_size() - full_allocatable_tokens)
    # No request grows longer, though SGLang may keep more for it.
    tokens = min(full_tokens, allocator.max_tokens)
    rows = self.req_to_token_pool
    in_rows = rows.size + getattr(rows, "pre_alloc_size", 0) - rows.available_size()
    return reservation(allocator, tokens, set_aside, in_rows)


def reservation(allocator: Any, tokens: int, set_aside: int, num_active: int) -> bool:
    """Whether a request of so many tokens, or of fewer, fits beside ``set_aside`` tokens more of
    ``num_active`` others: it is allocated shorter than it is asked for, and of a sliding group a
    shorter one may touch a page more."""
    groups, core, size = allocator.groups, allocator.core, allocator.page_size
    plans = core.plan.groups
    mapped = []
    for group_id in groups.mapped:
        group = plans[group_id].group
        most = group.held(Load(allocator.max_tokens))
        unfilled = num_active * most - core.num_used[group_id]
        mapped.append(group.held(Load(tokens)) * size + min(set_aside, max(0, unfilled) * size))
    states = allocator.capacity.states_per_request
    return core.fits_now(groups.need(tokens + set_aside, mapped, states=states))


def alloc_for_prompt(original: Callable[..., Any], self: Any, allocator: Any, **kwargs: Any) -> Any:
    """Slots of a prompt that is about to come, or of what a retracted request held."""
    if not is_ours(allocator):
        return original(self, allocator, **kwargs)
    req, end = kwargs["req"], kwargs["fill_len"]
    assert kwargs["total_prefix_len"] == 0, "a decode server keeps no cache"
    req.kv.kv_allocated_len = end
    return preallocate(allocator, req, end)


def preallocate(allocator: Any, req: Any, end: int) -> torch.Tensor | None:
    """Slots of a request's first ``end`` tokens, ``[end]`` int64, which somebody else is about to
    write; None if they do not fit. Of sliding groups only what its next step reads gets pages."""
    groups, tables, size = allocator.groups, allocator.tables, allocator.page_size
    row = req.kv.req_pool_idx
    rows, ends = np.array([row]), np.array([end], dtype=np.int64)

    def positions(start: int) -> StepDemand:
        return StepDemand([req], np.array([start], dtype=np.int64), ends, size, rows=rows)

    steps = {groups.row: positions(0)}
    begins = {}
    for group_id in groups.mapped:
        dead = groups.kinds[group_id].dead(end)
        begins[group_id] = 0 if dead is None else dead[1] - dead[1] % size
        steps[group_id] = positions(begins[group_id])
    nothing = np.zeros(1, dtype=np.int64)
    ids = allocator.core.alloc(
        rows, [steps[g].pages if g in steps else nothing for g in range(len(groups.kinds))]
    )
    if ids is None:
        return None
    allocator.buffer.zero_large_pages(allocator.core.large.take_stale(), allocator.forward_stream)
    allocator.buffer.settle(allocator.forward_stream)
    for group_id in groups.mapped:
        tables.enter(group_id, steps[group_id], ids[group_id])
        if begins[group_id]:
            groups.give_up(req.kv, group_id, begins[group_id])
        full, own = ids[groups.row], ids[group_id]
        slot_map = allocator.slot_maps[group_id]
        slot_map.part(full[: full.size - own.size])
        slot_map.pair(full[full.size - own.size :], own)
        slot_map.upload()
    return allocator.to_device(tables.enter(groups.row, steps[groups.row], ids[groups.row]))


def take_what_has_come(result: None, self: Any) -> None:
    """While a retracted request waits SGLang looks at no transfer. Those that have ended hold the
    pages that it waits for."""
    if self.disagg_decode_prealloc_queue.retracted_queue:
        self.waiting_queue.extend(self.disagg_decode_transfer_queue.pop_transferred())
