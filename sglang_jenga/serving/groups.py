"""A plan's layer groups in SGLang's three words: full, swa, mamba.

SGLang knows one kind of token slots (full), slots found through those (swa), and one slot per
request (mamba). Groups say how they are addressed; only here are the two turned into each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_jenga.layers.base import Address, LayerKind
from sglang_jenga.pages.tables import span
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.radix.policy import Range

Cursor = Hashable


class ServedGroups:
    """The groups of a pool by address. Ids are positions in the plan.

    ``row``: the group whose slots SGLang's rows name. ``encoder``: the one whose slots they name at
    the positions of an encoder's tokens, None if there is none. ``mapped``: those found through
    ``row``'s slots. ``state``: the one with a slot per request, None if there is none. ``sinks``:
    per group a request's first tokens, in whole small pages, that it never gives back.
    """

    def __init__(self, plan: PoolPlan) -> None:
        self.kinds: list[LayerKind] = [item.group.kind for item in plan.groups]
        self.tokens_per_page = plan.tokens_per_page
        by_address: dict[Address, list[int]] = {address: [] for address in Address}
        for group_id, kind in enumerate(self.kinds):
            by_address[kind.address].append(group_id)
        requests, encoders = by_address[Address.REQUEST], by_address[Address.ENCODER]
        labels = ", ".join(kind.label for kind in self.kinds)
        if len(requests) > 1:
            raise ValueError(f"at most one group of states can be served, got {labels}")
        if encoders and len(self.kinds) > 2:
            raise ValueError(f"cross attention is served beside full attention alone, got {labels}")
        if encoders and self.tokens_per_page > 1:
            raise ValueError(f"cross attention has pages of one token, not {self.tokens_per_page}")
        self.row = plan.row_group
        self.mapped = tuple(by_address[Address.MAPPED])
        self.encoder = encoders[0] if encoders else None
        # Whose slots a row names, in the order of its positions.
        self.of_rows = (*encoders, self.row)
        self.state = requests[0] if requests else None
        # What a row's positions have pages in.
        self.of_tokens = tuple(g for g in range(len(self.kinds)) if g != self.state)
        size = self.tokens_per_page
        self.sinks = [-(-kind.sinks // size) * size for kind in self.kinds]
        self._asks = [type(kind).step is not LayerKind.step for kind in self.kinds]

    def need(
        self,
        tokens: float,
        mapped: float | Sequence[float] | None = None,
        states: int = 0,
        encoder: int = 0,
    ) -> list[int]:
        """Small pages per group: of ``tokens``, of ``mapped`` tokens in the groups found through
        them (a number for each, or one for all; the same ``tokens`` if None), of states and of an
        ``encoder``'s tokens beside those, which models without any have no group for."""
        own = tokens if mapped is None else mapped
        each = list(own) if isinstance(own, Sequence) else [own] * len(self.mapped)
        counts = {self.row: tokens, **dict(zip(self.mapped, each, strict=True))}
        if self.encoder is not None:
            counts[self.encoder] = encoder
        return [
            states if group_id == self.state else -(-int(counts[group_id]) // self.tokens_per_page)
            for group_id in range(len(self.kinds))
        ]

    def demand(self, step: Any) -> list[np.ndarray]:
        """New small pages of each request of a step, per group."""
        if self.encoder is not None:
            spans = (step.span(kind.address) for kind in self.kinds)
            return [ends - starts for starts, ends in spans]
        return [
            kind.step(step.starts, step.ends, self.tokens_per_page) if asks else step.pages
            for kind, asks in zip(self.kinds, self._asks, strict=True)
        ]

    @staticmethod
    def length_in(kind: LayerKind, length: int, encoder: int) -> int:
        """How many of a request's first ``length`` tokens, of which the first are its
        ``encoder``'s, a group has entries of."""
        if not encoder:
            return 0 if kind.address is Address.ENCODER else length
        start, end = span(kind.address, 0, length, min(encoder, length))
        return int(end - start)

    def given_up(self, kv: Any, group_id: int) -> Range:
        """Positions of a mapped group of which a request has given its own pages back. What lies
        before them stays, being the trees' or alive for the request's life."""
        if group_id == self.mapped[0]:
            begin = kv.swa_dead_lo(self.tokens_per_page)
        else:
            begin = kv.cache_protected_len
        begin = max(begin, self.sinks[group_id])
        return begin, max(begin, kv.get_evicted_seqlen(self.cursor(group_id)))

    def give_up(self, kv: Any, group_id: int, end: int) -> None:
        """Its own pages up to ``end`` are gone, but for the sinks. SGLang counts what a request
        holds by a record of its own, which has a floor for them."""
        kv.set_evicted_seqlen(self.cursor(group_id), end)
        if self.sinks[group_id] and group_id == self.mapped[0]:
            kv.swa_evict_floor = max(kv.swa_evict_floor, self.sinks[group_id])

    # ---- SGLang's words ---------------------------------------------------------------------

    def wanted(self, params: EvictParams) -> list[int]:
        """Small pages per group that SGLang asks to evict."""
        return self.need(params.num_tokens, params.swa_num_tokens, params.mamba_num)

    def evicted(self, smalls: Sequence[int]) -> EvictResult:
        """What has been evicted, small pages per group, in SGLang's words."""
        return EvictResult(
            num_tokens_evicted=smalls[self.row] * self.tokens_per_page,
            swa_num_tokens_evicted=self.of_mapped(smalls),
            mamba_num_evicted=self.of_states(smalls),
        )

    def of_mapped(self, smalls: Sequence[int]) -> int:
        """Tokens that SGLang calls swa, those of the first mapped group: it adds and compares them,
        so they must be one group's. 0 without any."""
        return smalls[self.mapped[0]] * self.tokens_per_page if self.mapped else 0

    def of_states(self, smalls: Sequence[int]) -> int:
        """States, 0 without any."""
        return 0 if self.state is None else smalls[self.state]

    def cursor(self, group_id: int) -> Cursor:
        """Under which name SGLang's record of a request keeps how far the request has given up a
        mapped group's tokens: its own for the group that it knows, one of ours for others."""
        return ComponentType.SWA if group_id == self.mapped[0] else (ComponentType.SWA, group_id)
