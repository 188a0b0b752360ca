"""One text for a plan, so that the command line and the server's log say the same. Stdlib only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_jenga.layers.base import Load
from sglang_jenga.plan.planner import byte_bound, requests_held
from sglang_jenga.plan.spec import PoolPlan, format_bytes
from sglang_jenga.plan.stock import StockLayout, stock_requests

DEFAULT_LENGTHS = (1024, 8192, 32768)


class CapacityRow(NamedTuple):
    """Concurrent running requests of `num_tokens` tokens each, and an image's beside those where a
    model has an encoder; `stock` and `ratio` may be None.

    `bound` is the pool divided by what one request needs unpadded: no allocator holds more.
    """

    num_tokens: int
    requests: int
    bound: float
    stock: int | None = None
    ratio: float | None = None

    @property
    def tokens(self) -> int:
        return self.num_tokens * self.requests


def capacity_rows(
    plan: PoolPlan,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    *,
    stock: StockLayout | None = None,
    stock_bytes: int | None = None,
    states: int = 1,
    encoder: int = 0,
) -> tuple[CapacityRow, ...]:
    """Count what the plan holds at each length, and what stock SGLang holds in `stock_bytes`.

    `stock_bytes` defaults to the plan's bytes. `states` is the number of state slots a running
    request pins, `encoder` the tokens of an image that it has beside its text.
    """
    rows = []
    for num_tokens in lengths:
        load = Load(num_tokens + encoder, states, encoder=encoder)
        requests, bound = requests_held(plan, load), byte_bound(plan, load)
        if stock is None:
            rows.append(CapacityRow(num_tokens, requests, bound))
            continue
        held = stock_requests(stock, stock_bytes or plan.pool_bytes, load.tokens)
        ratio = requests / held if held else None
        rows.append(CapacityRow(num_tokens, requests, bound, held, ratio))
    return tuple(rows)


def format_plan(
    plan: PoolPlan,
    rows: Sequence[CapacityRow] = (),
    *,
    stock_summary: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Lay out the groups of a plan, its capacity, and what needs saying, without a last newline."""
    lines = [
        f"pool {format_bytes(plan.pool_bytes)}: {plan.num_large} large pages of "
        f"{format_bytes(plan.large_page_bytes)}",
        "",
        *_table(
            ["group", "layers", "entry", "tokens/small", "small page", "small/large", "padding"],
            [
                [
                    item.group.label,
                    str(len(item.group.layer_ids)),
                    format_bytes(item.group.entry_bytes),
                    str(item.group.tokens_per_page),
                    format_bytes(item.small_page_bytes),
                    str(item.smalls_per_large),
                    f"{100 * item.padding_fraction:.2f} %",
                ]
                for item in plan.groups
            ],
        ),
    ]
    null = plan.groups[plan.null_group]
    lines += [
        f"null pages: {plan.null_smalls} small of {null.group.label}, "
        f"{format_bytes(plan.null_smalls * null.small_page_bytes)}"
    ]
    if rows:
        lines += ["", *_capacity_table(rows)]
    if stock_summary:
        lines.append(f"stock: {stock_summary}")
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _capacity_table(rows: Sequence[CapacityRow]) -> list[str]:
    head = ["tokens/request", "requests", "tokens", "byte bound"]
    with_stock = any(row.stock is not None for row in rows)
    body = []
    for row in rows:
        cells = [str(row.num_tokens), str(row.requests), str(row.tokens), f"{row.bound:.1f}"]
        if with_stock:
            cells += [str(row.stock), "-" if row.ratio is None else f"{row.ratio:.2f}x"]
        body.append(cells)
    return _table(head + (["stock", "ratio"] if with_stock else []), body)


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in [head, *body]
    ]
