"""Small pages to rows of ``req_to_token``."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sglang_jenga.kernels.expand import expand

PAGE_SIZES = [1, 3, 16, 64, 256]
POISON = -77


class Batch(NamedTuple):
    """Arguments of ``expand``, and what the tables must hold afterwards, on the host."""

    ids: torch.Tensor
    window_ids: torch.Tensor
    indptr: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    max_tokens: int

    def arguments(self, device: str) -> list[torch.Tensor]:
        each = (self.ids, self.indptr, self.rows, self.starts, self.ends)
        return [tensor.to(device) for tensor in each]

    def expected(self, ids: torch.Tensor, shape: tuple[int, int], page_size: int) -> torch.Tensor:
        """Token by token: the slowest way to say it."""
        table = torch.full(shape, POISON, dtype=torch.int32)
        for i, row in enumerate(self.rows.tolist()):
            start, end = int(self.starts[i]), int(self.ends[i])
            for position in range(start, end):
                page = int(self.indptr[i]) + position // page_size - start // page_size
                table[row, position] = int(ids[page]) * page_size + position % page_size
        return table


def batch_of(
    page_size: int,
    spans: list[tuple[int, int]],
    *,
    num_rows: int = 9,
    dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> Batch:
    """Requests over the given positions, on shuffled rows; some pages are behind the window."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([start for start, _ in spans], dtype=dtype)
    ends = torch.tensor([end for _, end in spans], dtype=dtype)
    pages = [
        -(-end // page_size) - start // page_size if end > start else 0 for start, end in spans
    ]
    indptr = torch.tensor([0, *pages]).cumsum(0).to(dtype)
    limit = 2**31 // page_size
    ids, window_ids = torch.randint(1, limit, (2, sum(pages)), generator=generator).to(dtype)
    window_ids[torch.rand(window_ids.shape, generator=generator) < 0.5] = 0
    rows = torch.randperm(num_rows, generator=generator)[: len(spans)].to(dtype)
    longest = max((end - start for start, end in spans), default=0)
    return Batch(ids, window_ids, indptr, rows, starts, ends, longest)


def spans_for(page_size: int) -> list[tuple[int, int]]:
    """A whole prompt, a step inside a page, one over a border, one token, none, and a long one."""
    return [
        (0, 2 * page_size + 1),
        (page_size + page_size // 2, page_size + page_size // 2 + 1),
        (page_size - 1, page_size + 1),
        (5, 6),
        (4, 4),
        (page_size // 3, 1100),
    ]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expand_writes_only_the_rows_of_its_requests(load, device, page_size, dtype):
    module = load("expand")
    batch = batch_of(page_size, spans_for(page_size), dtype=dtype)
    table = torch.full((9, 1200), POISON, dtype=torch.int32, device=device)

    module.expand(*batch.arguments(device), table, page_size=page_size, max_tokens=batch.max_tokens)

    torch.testing.assert_close(table.cpu(), batch.expected(batch.ids, (9, 1200), page_size))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_one_launch_fills_the_window_rows_too(load, device, page_size):
    module = load("expand")
    batch = batch_of(page_size, spans_for(page_size), seed=1)
    table, window = torch.full((2, 9, 1200), POISON, dtype=torch.int32, device=device)

    module.expand(
        *batch.arguments(device),
        table,
        page_size=page_size,
        max_tokens=batch.max_tokens,
        window_ids=batch.window_ids.to(device),
        window_table=window,
    )

    shape = (9, 1200)
    torch.testing.assert_close(table.cpu(), batch.expected(batch.ids, shape, page_size))
    torch.testing.assert_close(window.cpu(), batch.expected(batch.window_ids, shape, page_size))


def test_a_page_behind_the_window_points_into_the_null_page(load, device):
    module = load("expand")
    batch = batch_of(16, [(0, 40)])
    table, window = torch.full((2, 9, 48), POISON, dtype=torch.int32, device=device)

    module.expand(
        *batch.arguments(device),
        table,
        page_size=16,
        max_tokens=40,
        window_ids=torch.tensor([0, 0, 5], device=device),
        window_table=window,
    )

    row = window[int(batch.rows[0])].tolist()
    assert max(row[:32]) < 16
    assert row[32:40] == list(range(80, 88))


@pytest.mark.parametrize("page_size", [3, 16])
def test_tables_may_be_strided_slices(load, device, page_size):
    module = load("expand")
    batch = batch_of(page_size, [(0, 50), (7, 20)], num_rows=4)
    whole, other = torch.full((2, 14, 120), POISON, dtype=torch.int32, device=device)
    table, window = whole[3:7, 10:70], other[2:10:2, 0:120:2]
    before = whole.clone()

    module.expand(
        *batch.arguments(device),
        table,
        page_size=page_size,
        max_tokens=batch.max_tokens,
        window_ids=batch.window_ids.to(device),
        window_table=window,
    )

    before[3:7, 10:70] = batch.expected(batch.ids, (4, 60), page_size).to(device)
    torch.testing.assert_close(whole, before)
    expected = batch.expected(batch.window_ids, (4, 60), page_size)
    torch.testing.assert_close(window.cpu(), expected)
    assert (other[1::2] == POISON).all() and (other[:, 1::2] == POISON).all()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_expand_equals_its_reference(load, device, page_size):
    module = load("expand")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        spans = [sorted(torch.randint(0, 700, (2,), generator=generator).tolist()) for _ in "12345"]
        batch = batch_of(page_size, spans, seed=seed)
        ours, theirs = torch.full((2, 9, 700), POISON, dtype=torch.int32, device=device)

        arguments = batch.arguments(device)
        module.expand(*arguments, ours, page_size=page_size, max_tokens=700)
        module.expand_reference(*arguments, theirs, page_size)

        torch.testing.assert_close(ours, theirs)


def test_no_requests_and_no_tokens_write_nothing(load, device):
    module = load("expand")
    table = torch.full((3, 8), POISON, dtype=torch.int32, device=device)

    for spans in ([], [(0, 0)], [(8, 8), (3, 3)]):
        batch = batch_of(4, spans, num_rows=3)
        for max_tokens in (0, 8):
            module.expand(*batch.arguments(device), table, page_size=4, max_tokens=max_tokens)

    assert (table == POISON).all()


def test_a_row_beyond_two_to_the_31_elements_is_found(load, device, tmp_path):
    """The table is a hole in a file, of which the test touches a few pages, or a GPU's memory."""
    module = load("expand")
    columns, last = 1 << 20, 1 << 11
    if device == "cpu":
        name, size = str(tmp_path / "table"), (last + 1) * columns
        table = torch.from_file(name, shared=True, size=size, dtype=torch.int32)
    else:
        table = torch.zeros((last + 1) * columns, dtype=torch.int32, device=device)
    table = table.view(last + 1, columns)
    request = torch.tensor([7], device=device)

    module.expand(
        request,
        torch.tensor([0, 1], device=device),
        torch.tensor([last], device=device),
        torch.tensor([columns - 3], device=device),
        torch.tensor([columns], device=device),
        table,
        page_size=4,
        max_tokens=3,
    )

    assert table[last, -4:].tolist() == [0, 29, 30, 31]
    assert not table[0, :8].any()  # where 32 bits would have led


def good_call() -> dict:
    batch = batch_of(4, [(0, 9), (4, 8)], num_rows=3)
    return {
        "page_ids": batch.ids,
        "indptr": batch.indptr,
        "rows": batch.rows,
        "starts": batch.starts,
        "ends": batch.ends,
        "table": torch.zeros(3, 12, dtype=torch.int32),
        "page_size": 4,
        "max_tokens": 9,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"max_tokens": -1}, "max_tokens: expected at least 0"),
        ({"max_tokens": 8}, "max_tokens: expected 9, got 8"),
        ({"page_ids": torch.zeros(4)}, "page_ids: expected int32 or int64"),
        ({"page_ids": torch.zeros(4, 1, dtype=torch.int64)}, r"\[any\] on cpu"),
        ({"page_ids": torch.zeros(8, dtype=torch.int64)[::2]}, "page_ids: expected contiguous"),
        ({"table": torch.zeros(3, 12)}, "table: expected int32"),
        ({"table": torch.zeros(36, dtype=torch.int32)}, r"table: expected int32 \[any, any\]"),
        ({"rows": torch.tensor(1)}, "rows: expected"),
        ({"rows": torch.tensor([0, 3])}, r"rows: expected ids in \[0, 3\), got 0 to 3"),
        ({"rows": torch.tensor([1, 1])}, "rows: expected every row once"),
        ({"indptr": torch.tensor([0, 4])}, r"indptr: expected int32 or int64 \[3\]"),
        ({"indptr": torch.tensor([0, 2, 4])}, "indptr: expected to run from 0 to 4"),
        ({"indptr": torch.tensor([0, 3, 5])}, "indptr: expected to run from 0 to 4"),
        ({"starts": torch.tensor([-1, 4])}, "0 <= start <= end <= 12"),
        ({"starts": torch.tensor([0, 9])}, "0 <= start <= end <= 12"),
        ({"ends": torch.tensor([13, 8])}, "0 <= start <= end <= 12"),
        ({"ends": torch.tensor([9])}, r"ends: expected int32 or int64 \[2\]"),
        ({"page_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "on cpu, got int64"),
        ({"window_ids": torch.zeros(4, dtype=torch.int64)}, "expected both or neither"),
        (
            {
                "window_ids": torch.zeros(3, dtype=torch.int64),
                "window_table": torch.zeros(3, 12, dtype=torch.int32),
            },
            r"window_ids: expected int64 \[4\]",
        ),
        (
            {
                "window_ids": torch.zeros(4, dtype=torch.int64),
                "window_table": torch.zeros(3, 11, dtype=torch.int32),
            },
            r"window_table: expected int32 \[3, 12\]",
        ),
    ],
)
def test_a_bad_call_is_refused_in_one_line_and_writes_nothing(change, message):
    call = good_call() | change
    with pytest.raises(ValueError, match=message) as caught:
        expand(**call)

    assert "\n" not in str(caught.value)
    assert not call["table"].any()


def test_without_cuda_and_interpreter_the_reference_answers():
    call = good_call()
    window_table = torch.zeros_like(call["table"])
    expand(**call, window_ids=call["page_ids"], window_table=window_table)

    assert call["table"][call["rows"][0], 0] == call["page_ids"][0] * 4
    torch.testing.assert_close(window_table, call["table"])
