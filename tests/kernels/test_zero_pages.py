"""Zeroing pages of a raw buffer."""

from __future__ import annotations

import pytest
import torch

from sglang_jenga.kernels.zero_pages import zero_pages

POISON = 0xA7
# Multiples of 4 first: what pools have. Then pages longer than a block, and bytes alone.
PAGE_BYTES = [4, 12, 16, 52, 1 << 10, 4 * 4099, 8 * 4099, 8 * 8192, 1, 7, 4098]


def buffer_of(num_bytes: int, device: str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.full((num_bytes,), POISON, dtype=torch.uint8, device=device).view(dtype)


def expected(pool: torch.Tensor, ids: list[int], page_bytes: int, stride: int) -> torch.Tensor:
    """The bytes after zeroing, by slices."""
    flat = pool.cpu().view(torch.uint8).clone()
    for page in ids:
        flat[page * stride : page * stride + page_bytes] = 0
    return flat


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("gap", [0, 4, 3, 100])
def test_zero_pages_clears_its_pages_and_no_byte_beside_them(load, device, page_bytes, gap):
    module = load("zero_pages")
    stride = page_bytes + gap
    pool = buffer_of(7 * stride, device)
    ids = [5, 0, 6, 3]
    want = expected(pool, ids, page_bytes, stride)

    module.zero_pages(pool, torch.tensor(ids, device=device), page_bytes, stride)

    torch.testing.assert_close(pool.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_stride_defaults_to_the_page(load, device, dtype, id_dtype):
    module = load("zero_pages")
    pool = buffer_of(5 * 28, device, dtype)
    want = expected(pool, [1, 4], 28, 28)

    module.zero_pages(pool, torch.tensor([1, 4], dtype=id_dtype, device=device), 28)

    torch.testing.assert_close(pool.cpu().view(torch.uint8), want)


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_a_buffer_may_begin_at_any_address(load, device, shift):
    module = load("zero_pages")
    whole = buffer_of(shift + 3 * 24 + 5, device)
    want = whole.cpu().clone()
    want[shift + 24 : shift + 48] = 0

    module.zero_pages(whole[shift:], torch.tensor([1], device=device), 24)

    torch.testing.assert_close(whole.cpu(), want)


def test_last_page_may_end_with_the_buffer_inside_its_stride(load, device):
    module = load("zero_pages")
    pool = buffer_of(2 * 100 + 40, device)
    want = expected(pool, [2], 40, 100)

    module.zero_pages(pool, torch.tensor([2], device=device), 40, 100)

    torch.testing.assert_close(pool.cpu(), want)


def test_ids_may_repeat_and_may_be_strided(load, device):
    module = load("zero_pages")
    pool = buffer_of(8 * 16, device)
    ids = torch.tensor([2, 7, 2, 7, 5, 7], device=device)[::2]
    want = expected(pool, [2, 5], 16, 16)

    module.zero_pages(pool, ids, 16)

    torch.testing.assert_close(pool.cpu(), want)


def test_no_pages_clear_nothing(load, device):
    module = load("zero_pages")
    none = torch.empty(0, dtype=torch.int64, device=device)
    pool = buffer_of(64, device)

    module.zero_pages(pool, none, 16)
    module.zero_pages(pool[:0], none, 16)

    assert (pool == POISON).all()


@pytest.mark.parametrize("page_bytes", [4, 52, 4096])
def test_zero_pages_equals_its_reference(load, device, page_bytes):
    module = load("zero_pages")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        stride = page_bytes + int(torch.randint(0, 40, (), generator=generator))
        ids = torch.randint(0, 20, (6,), generator=generator).to(device)
        ours = buffer_of(20 * stride, device)
        theirs = ours.clone()

        module.zero_pages(ours, ids, page_bytes, stride)
        module.zero_pages_reference(theirs, ids, page_bytes, stride)

        torch.testing.assert_close(ours, theirs)


def test_a_page_beyond_four_gib_is_found(load, device):
    """Addresses in 64 bits: 32 would clear the second page instead. The host touches two pages."""
    module = load("zero_pages")
    page_bytes = (1 << 20) + 1  # odd, so in words of one byte
    last = 1 << 12
    pool = torch.empty((last + 1) * page_bytes, dtype=torch.uint8, device=device)
    wrapped = pool[last * page_bytes & 0xFFFFFFFF :][:page_bytes]
    wrapped.fill_(POISON)
    pool[-page_bytes:] = POISON

    module.zero_pages(pool, torch.tensor([last], device=device), page_bytes)

    assert not pool[-page_bytes:].any()
    assert (wrapped == POISON).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": torch.zeros(64)}, "pool: expected uint8 or int32"),
        ({"pool": torch.zeros(8, 8, dtype=torch.uint8)}, r"pool: expected uint8 or int32 \[any\]"),
        ({"pool": torch.zeros(128, dtype=torch.uint8)[::2]}, "pool: expected contiguous bytes"),
        ({"page_ids": torch.zeros(2)}, "page_ids: expected int32 or int64"),
        ({"page_ids": torch.tensor(1)}, "page_ids: expected int32 or int64"),
        ({"page_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "on cpu, got int64"),
        ({"page_ids": torch.tensor([0, 4])}, r"page_ids: expected ids in \[0, 4\), got 0 to 4"),
        ({"page_ids": torch.tensor([-1])}, "got -1 to -1"),
        ({"page_bytes": 0}, "page: expected 0 < bytes <= stride, got 0 and 0"),
        ({"page_bytes": 128}, r"expected ids in \[0, 0\)"),
        ({"page_stride_bytes": 12}, "page: expected 0 < bytes <= stride, got 16 and 12"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(change, message):
    call = {
        "pool": torch.zeros(64, dtype=torch.uint8),
        "page_ids": torch.tensor([1, 2]),
        "page_bytes": 16,
    }

    with pytest.raises(ValueError, match=message) as caught:
        zero_pages(**call | change)

    assert "\n" not in str(caught.value)


def test_without_cuda_and_interpreter_the_reference_answers():
    pool = buffer_of(64, "cpu")

    zero_pages(pool, torch.tensor([1]), 16)

    torch.testing.assert_close(pool, expected(buffer_of(64, "cpu"), [1], 16, 16))
