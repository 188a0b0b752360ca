"""What a pool is made of: layer groups, and the plan that cuts bytes into large and small pages.

Numbers only: no torch, no SGLang. Everything else (planner, allocator, pool, trees)
speaks in these terms.

Vocabulary (one meaning each, everywhere in this project):

    entry        one token's bytes over all layers of a group (state group: one request's state)
    small page   tokens_per_page entries of one group
    large page   a common multiple of every group's small page; bound to one group at a time
    slot         SGLang's address of a token in a group's view: small_id * tokens_per_page + offset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_jenga.layers.base import Address, LayerKind, Load

STATE_SINK = 1
"""Small id of the state that rows of padding read and write."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one kind and one per-token size; they share small-page ids.

    ``entry_bytes`` is unpadded: the sum over the group's layers of one token's K and V bytes, or of
    one request's state for a kind with a slot per request (whose ``tokens_per_page`` is 1).
    ``element`` names the number format of the bytes: a large page that goes from one format to
    another must be zeroed, because masked rows still enter ``0 * x`` and x may read as NaN.

    A model of states or windows only has a ``full`` group without layers: its tokens still have
    slots, which rows and trees name them by, and ``entry_bytes`` is what a slot costs.

    ``layer_ids`` are the layers that this rank runs. The stages of a pipeline run different ones
    and plan alike, since each schedules by itself: ``entry_bytes`` counts as many layers as the
    stage has that has most, which are so many ``elsewhere`` more than here.
    """

    kind: LayerKind
    layer_ids: tuple[int, ...]
    entry_bytes: int
    tokens_per_page: int = 1
    element: str = ""
    elsewhere: int = 0

    def __post_init__(self) -> None:
        if not self.num_layers and self.kind.address is not Address.ROW:
            raise ValueError(f"a {self.label} group needs at least one layer, got none")
        if self.entry_bytes <= 0 or self.tokens_per_page <= 0:
            raise ValueError(
                f"entry_bytes and tokens_per_page must be positive, got {self.entry_bytes} and "
                f"{self.tokens_per_page}"
            )
        if self.kind.address is Address.REQUEST and self.tokens_per_page != 1:
            raise ValueError(f"a {self.label} group has one entry per small page")

    @property
    def num_layers(self) -> int:
        """Layers that an entry has room for."""
        return len(self.layer_ids) + self.elsewhere

    @property
    def label(self) -> str:
        """Name for logs and tables: ``full``, ``window(1024)``, ``state``."""
        return self.kind.label

    @property
    def window(self) -> int | None:
        """Tokens that a step reads at most, the current one included; None: all there are."""
        return getattr(self.kind, "width", None)

    def held(self, load: Load) -> int:
        """Small pages that one such request holds at most."""
        return self.kind.held(load, self.tokens_per_page)


def row_group(groups: Sequence[LayerGroup]) -> int:
    """Position of the group whose slots SGLang's rows name.

    Raises:
        ValueError: there is none, or several.
    """
    rows = [at for at, group in enumerate(groups) if group.kind.address is Address.ROW]
    if len(rows) != 1:
        labels = ", ".join(group.label for group in groups)
        raise ValueError(f"one group of full slots is needed, got {labels}")
    return rows[0]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group inside a pool. Ids of its small pages run over the whole buffer.

    Invariant: ``smalls_per_large * small_page_bytes == PoolPlan.large_page_bytes``.
    """

    group: LayerGroup
    padded_entry_bytes: int
    smalls_per_large: int

    @property
    def small_page_bytes(self) -> int:
        return self.padded_entry_bytes * self.group.tokens_per_page

    @property
    def null_pages(self) -> int:
        """Small pages, from id 0 on, that are never handed out."""
        return 1 + STATE_SINK if self.group.kind.address is Address.REQUEST else 1

    @property
    def padding_fraction(self) -> float:
        """Share of an entry that holds nothing, in [0, 1)."""
        return 1 - self.group.entry_bytes / self.padded_entry_bytes


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One buffer of ``num_large`` large pages.

    Small id 0 of every group is its null page, the padding sink of CUDA graphs, and all of them
    start at byte 0. What padding writes must read as numbers in every format, and a state does not.
    So padding writes states to small id 1, `STATE_SINK`, and small id 0 of states is never written.

        KV     [0]  . . . . . .        null page of each KV group
        state  [ 0 ][ 1 ]  . .         nobody's, sink

    The first ``null_larges`` large pages are therefore bound for life to ``null_group``; only its
    first ``null_smalls`` small pages, which overlap one of these, are never handed out:

        null_smalls * small_page_bytes(null_group) >= null_bytes
    """

    groups: tuple[GroupPlan, ...]
    large_page_bytes: int
    num_large: int

    @property
    def row_group(self) -> int:
        """Group whose slots SGLang's rows name."""
        return row_group([item.group for item in self.groups])

    @property
    def state_cost_tokens(self) -> int:
        """Tokens whose full-attention KV takes the bytes of one state; 0 without states."""
        states = [item for item in self.groups if item.group.kind.address is Address.REQUEST]
        if not states:
            return 0
        return states[0].padded_entry_bytes // self.groups[self.row_group].padded_entry_bytes

    @property
    def tokens_per_page(self) -> int:
        """SGLang's page size: tokens of a small page of each group that tokens have pages in."""
        return self.groups[self.row_group].group.tokens_per_page

    @property
    def pool_bytes(self) -> int:
        return self.large_page_bytes * self.num_large

    @property
    def null_group(self) -> int:
        """Group that the null pages belong to: the smallest small page loses the fewest bytes."""
        sizes = [group.small_page_bytes for group in self.groups]
        return sizes.index(min(sizes))

    @property
    def null_bytes(self) -> int:
        """Bytes at the start of the pool that only padding reads and writes."""
        return max(group.null_pages * group.small_page_bytes for group in self.groups)

    @property
    def null_smalls(self) -> int:
        """Small pages of ``null_group`` at the start of the pool that are never handed out."""
        return -(-self.null_bytes // self.groups[self.null_group].small_page_bytes)

    @property
    def null_larges(self) -> int:
        """Large pages that these lie in: two where a state fills a large page alone, else one."""
        return -(-self.null_smalls // self.groups[self.null_group].smalls_per_large)

    def num_small(self, group_id: int) -> int:
        """Length of the id space of a group, the null page included."""
        return self.num_large * self.groups[group_id].smalls_per_large

    def num_slots(self, group_id: int) -> int:
        """Rows of the group's view: one per token of every small id."""
        return self.num_small(group_id) * self.groups[group_id].group.tokens_per_page


def format_bytes(num_bytes: int) -> str:
    """Write bytes in the largest binary unit that keeps the number at least 1."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.2f} {unit}"
