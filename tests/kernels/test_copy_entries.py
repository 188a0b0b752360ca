"""Copying entries inside a raw buffer."""

from __future__ import annotations

import pytest
import torch

from sglang_jenga.kernels.copy_entries import copy_entries

ENTRY_BYTES = [4, 12, 48, 1 << 10, 4 * 4099, 8 * 8193, 1, 7, 4098]


def buffer_of(num_bytes: int, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).to(device)


def expected(
    pool: torch.Tensor, pairs: list[tuple[int, int]], entry_bytes: int, stride: int
) -> torch.Tensor:
    before = pool.cpu()
    after = before.clone()
    for src, dst in pairs:
        after[dst * stride : dst * stride + entry_bytes] = before[
            src * stride : src * stride + entry_bytes
        ]
    return after


@pytest.mark.parametrize("entry_bytes", ENTRY_BYTES)
@pytest.mark.parametrize("gap", [0, 4, 5, 96])
def test_copy_entries_writes_its_targets_and_no_byte_beside_them(load, device, entry_bytes, gap):
    module = load("copy_entries")
    stride = entry_bytes + gap
    pool = buffer_of(9 * stride, device)
    pairs = [(3, 8), (0, 5), (3, 1)]
    want = expected(pool, pairs, entry_bytes, stride)
    src, dst = torch.tensor(pairs, device=device).T

    module.copy_entries(pool, src, dst, entry_bytes, stride)

    torch.testing.assert_close(pool.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_the_stride_defaults_to_the_entry(load, device, dtype, id_dtype):
    module = load("copy_entries")
    pool = buffer_of(4 * 20, device)
    want = expected(pool, [(0, 3)], 20, 20)
    src, dst = (torch.tensor([entry], dtype=id_dtype, device=device) for entry in (0, 3))

    module.copy_entries(pool.view(dtype), src, dst, 20)

    torch.testing.assert_close(pool.cpu(), want)


@pytest.mark.parametrize("shift", [1, 4])
def test_an_entry_may_be_a_part_of_a_larger_one(load, device, shift):
    """The buffer begins at the part; its last entry ends where the part does."""
    module = load("copy_entries")
    whole = buffer_of(5 * 64, device)
    part = whole[shift : 4 * 64 + shift + 24]
    want = whole.cpu().clone()
    want[4 * 64 + shift : 4 * 64 + shift + 24] = want[64 + shift : 64 + shift + 24].clone()

    module.copy_entries(
        part, torch.tensor([1], device=device), torch.tensor([4], device=device), 24, 64
    )

    torch.testing.assert_close(whole.cpu(), want)


def test_no_copies_change_nothing(load, device):
    module = load("copy_entries")
    pool = buffer_of(64, device)
    before = pool.clone()
    none = torch.empty(0, dtype=torch.int64, device=device)

    module.copy_entries(pool, none, none, 16)

    torch.testing.assert_close(pool, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_with_nan_arrives_bit_by_bit(load, device, dtype):
    module = load("copy_entries")
    entries = torch.full((3, 24), float("nan"), dtype=dtype, device=device)
    entries[2] = 1.0
    entry_bytes = 24 * dtype.itemsize

    module.copy_entries(
        entries.view(torch.uint8).ravel(),
        torch.tensor([0], device=device),
        torch.tensor([2], device=device),
        entry_bytes,
    )

    assert torch.equal(entries[2].view(torch.uint8), entries[0].view(torch.uint8))


def test_an_entry_beyond_four_gib_is_found(load, device):
    """Addresses in 64 bits; the host touches a few entries."""
    module = load("copy_entries")
    entry_bytes, stride = 4097, (1 << 30) + 4097
    pool = torch.empty(4 * stride + entry_bytes, dtype=torch.uint8, device=device)
    entries = pool.as_strided((5, entry_bytes), (stride, 1))
    wrapped = pool[4 * stride & 0xFFFFFFFF :][:entry_bytes]
    wrapped.fill_(1)
    entries[3], entries[4] = 3, 4

    for src, dst in ((3, 4), (4, 0)):
        ids = [torch.tensor([entry], device=device) for entry in (src, dst)]
        module.copy_entries(pool, *ids, entry_bytes, stride)

    assert (entries[[0, 4]] == 3).all()
    assert (wrapped == 1).all()


@pytest.mark.parametrize("entry_bytes", [4, 52, 4096])
def test_copy_entries_equals_its_reference(load, device, entry_bytes):
    module = load("copy_entries")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        stride = entry_bytes + int(torch.randint(0, 40, (), generator=generator))
        src, dst = torch.randperm(20, generator=generator)[:14].to(device).view(2, 7)
        ours = buffer_of(20 * stride, device, seed)
        theirs = ours.clone()

        module.copy_entries(ours, src, dst, entry_bytes, stride)
        module.copy_entries_reference(theirs, src, dst, entry_bytes, stride)

        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": torch.zeros(64)}, "pool: expected uint8 or int32"),
        ({"pool": torch.zeros(128, dtype=torch.uint8)[::2]}, "pool: expected contiguous bytes"),
        ({"src": torch.zeros(2)}, "src: expected int32 or int64"),
        ({"dst": torch.tensor([3])}, r"dst: expected int32 or int64 \[2\]"),
        ({"dst": torch.zeros(2, dtype=torch.int64, device="meta")}, "on cpu, got int64"),
        ({"src": torch.tensor([0, 4])}, r"src: expected ids in \[0, 4\), got 0 to 4"),
        ({"dst": torch.tensor([-1, 2])}, r"dst: expected ids in \[0, 4\), got -1 to 2"),
        ({"dst": torch.tensor([3, 3])}, "dst: expected entries named once and not in src"),
        ({"dst": torch.tensor([3, 0])}, "dst: expected entries named once and not in src"),
        ({"entry_bytes": -4}, "entry: expected 0 < bytes <= stride, got -4 and -4"),
        ({"entry_stride_bytes": 12}, "entry: expected 0 < bytes <= stride, got 16 and 12"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(change, message):
    call = {
        "pool": torch.zeros(64, dtype=torch.uint8),
        "src": torch.tensor([0, 1]),
        "dst": torch.tensor([2, 3]),
        "entry_bytes": 16,
    }

    with pytest.raises(ValueError, match=message) as caught:
        copy_entries(**call | change)

    assert "\n" not in str(caught.value)


def test_without_cuda_and_interpreter_the_reference_answers():
    pool = buffer_of(64, "cpu")
    want = expected(pool, [(0, 2)], 16, 16)

    copy_entries(pool, torch.tensor([0]), torch.tensor([2]), 16)

    torch.testing.assert_close(pool, want)
