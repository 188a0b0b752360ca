"""Storing K and V of tokens into strided pool views."""

from __future__ import annotations

import pytest
import torch

from sglang_jenga.kernels.scatter_kv import scatter_kv

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ONE_OF_EACH_WIDTH_IS_QUICK = [
    pytest.param(dtype, marks=pytest.mark.slow if i in (1, 4) else ())
    for i, dtype in enumerate(DTYPES)
]
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
POISON = 0xFF  # NaN in every type


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers of the same width: NaN equals itself, and fp8 compares at all."""
    return tensor.cpu().view(RAW[tensor.element_size()])


def rows_of(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Random bits, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*shape[:-1], shape[-1] * dtype.itemsize)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return raw.view(dtype).to(device)


def pools_of(
    num_slots: int, heads: int, k_dim: int, v_dim: int, gap: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A buffer of NaN, and K and V of one layer in it: each entry is gap, K, V, gap."""
    stride = 2 * gap + heads * (k_dim + v_dim)
    buffer = torch.full((num_slots * stride * dtype.itemsize,), POISON, dtype=torch.uint8)
    buffer = buffer.to(device).view(dtype)
    k_pool = buffer.as_strided((num_slots, heads, k_dim), (stride, k_dim, 1), gap)
    v_pool = buffer.as_strided((num_slots, heads, v_dim), (stride, v_dim, 1), gap + heads * k_dim)
    return buffer, k_pool, v_pool


def check_store(module, k, v, loc, pools) -> None:
    """Run the kernel; every bit of the buffer is right, the gaps included."""
    buffer, k_pool, v_pool = pools
    want = bits(buffer).clone()
    offset = buffer.storage_offset()
    for rows, pool in ((k, k_pool), (v, v_pool)):
        view = want.as_strided(pool.shape, pool.stride(), pool.storage_offset() - offset)
        for row, slot in zip(bits(rows), loc.tolist(), strict=True):
            view[slot] = row

    module.scatter_kv(k, v, loc, k_pool, v_pool)

    assert torch.equal(bits(buffer), want)


@pytest.mark.parametrize("dtype", ONE_OF_EACH_WIDTH_IS_QUICK)
@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim"), [(1, 1, 1), (2, 8, 8), (3, 5, 7), (8, 128, 128), (4, 192, 128)]
)
def test_scatter_kv_writes_its_slots_and_no_bit_beside_them(
    load, device, dtype, heads, k_dim, v_dim
):
    module = load("scatter_kv")
    for gap in (0, 3, 64):
        pools = pools_of(40, heads, k_dim, v_dim, gap, dtype, device)
        loc = torch.randperm(40, generator=torch.Generator().manual_seed(gap))[:11].to(device)
        k = rows_of(11, heads, k_dim, dtype=dtype, device=device)
        v = rows_of(11, heads, v_dim, dtype=dtype, device=device, seed=1)

        check_store(module, k, v, loc, pools)


@pytest.mark.parametrize(
    "page_size", [1, 3, 16, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 256))]
)
def test_a_token_lands_in_its_page_of_a_shared_pool(load, device, page_size):
    """Slots of pages far apart, as ``small_id * page_size + offset``."""
    module = load("scatter_kv")
    pools = pools_of(7 * page_size, 2, 4, 4, 10, torch.bfloat16, device)
    pages = torch.tensor([5, 2]).repeat_interleave(page_size)
    loc = (pages * page_size + torch.arange(page_size).repeat(2)).to(device)
    k, v = rows_of(2, loc.numel(), 2, 4, dtype=torch.bfloat16, device=device)

    check_store(module, k, v, loc, pools)


def test_k_and_v_may_be_slices_of_a_fused_projection(load, device):
    module = load("scatter_kv")
    fused = rows_of(6, 4 + 2 + 2, 16, dtype=torch.float16, device=device)
    _, k, v = fused.split([4, 2, 2], dim=1)
    pools = pools_of(20, 2, 16, 16, 1, torch.float16, device)

    check_store(module, k, v, torch.tensor([9, 0, 19, 3, 7, 4], device=device), pools)


def test_heads_may_lie_apart_in_rows_and_pool(load, device):
    module = load("scatter_kv")
    k, v = (rows_of(5, 16, 3, 8, dtype=torch.float32, device=device)[:, i].mT for i in (0, 1))
    k, v = k.mT[:, ::2], v.mT[:, ::2]
    buffer = rows_of(10, 2, 40, dtype=torch.float32, device=device)
    k_pool, v_pool = buffer[:, :, 3:11], buffer[:, :, 20:28]
    loc = torch.tensor([2, 9, 0, 4, 7], device=device)

    check_store(module, k, v, loc, (buffer.ravel(), k_pool, v_pool))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_pool_may_keep_a_type_as_plain_bits(load, device, dtype):
    module = load("scatter_kv")
    pools = pools_of(8, 2, 8, 8, 2, RAW[dtype.itemsize], device)
    k, v = rows_of(2, 3, 2, 8, dtype=dtype, device=device)

    check_store(module, k, v, torch.tensor([7, 1, 2], device=device), pools)


def test_slots_may_be_int32_and_strided(load, device):
    module = load("scatter_kv")
    pools = pools_of(8, 1, 4, 4, 0, torch.float32, device)
    k, v = rows_of(2, 3, 1, 4, dtype=torch.float32, device=device)
    loc = torch.tensor([6, 0, 1, 0, 3, 0], dtype=torch.int32, device=device)[::2]

    check_store(module, k, v, loc, pools)


def test_padding_tokens_may_share_the_null_slot(load, device):
    module = load("scatter_kv")
    buffer, k_pool, v_pool = pools_of(8, 1, 4, 4, 0, torch.float32, device)
    k, v = rows_of(2, 4, 1, 4, dtype=torch.float32, device=device)

    module.scatter_kv(k, v, torch.tensor([0, 5, 0, 0], device=device), k_pool, v_pool)

    assert torch.equal(bits(k_pool[5]), bits(k[1]))
    assert any(torch.equal(bits(k_pool[0]), bits(k[i])) for i in (0, 2, 3))
    untouched = [1, 2, 3, 4, 6, 7]
    assert (bits(buffer).view(8, 8)[untouched] == -1).all()


def test_a_slot_beyond_four_gib_is_found(load, device):
    """Addresses in 64 bits; the host touches a few slots."""
    module = load("scatter_kv")
    stride = (1 << 30) + 64
    pool = torch.empty(4 * stride + 64, dtype=torch.uint8, device=device)
    k_pool, v_pool = (pool[at:].as_strided((5, 2, 8), (stride, 8, 1)) for at in (0, 32))
    wrapped = pool[4 * stride & 0xFFFFFFFF :][:64]
    wrapped.fill_(POISON)
    k, v = rows_of(2, 1, 2, 8, dtype=torch.uint8, device=device)

    module.scatter_kv(k, v, torch.tensor([4], device=device), k_pool, v_pool)

    assert torch.equal(k_pool[4], k[0]) and torch.equal(v_pool[4], v[0])
    assert (wrapped == POISON).all()


def test_no_tokens_write_nothing(load, device):
    module = load("scatter_kv")
    buffer, k_pool, v_pool = pools_of(4, 2, 4, 4, 1, torch.float32, device)
    none = torch.empty(0, 2, 4, device=device)

    module.scatter_kv(none, none, torch.empty(0, dtype=torch.int64, device=device), k_pool, v_pool)

    assert (bits(buffer) == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_kv_equals_its_reference(load, device, dtype):
    module = load("scatter_kv")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        heads, k_dim, v_dim, gap = torch.randint(1, 20, (4,), generator=generator).tolist()
        k = rows_of(9, heads, k_dim, dtype=dtype, device=device, seed=seed)
        v = rows_of(9, heads, v_dim, dtype=dtype, device=device, seed=seed + 1)
        loc = torch.randperm(30, generator=generator)[:9].to(device)
        ours, *our_pools = pools_of(30, heads, k_dim, v_dim, gap, dtype, device)
        theirs, *their_pools = pools_of(30, heads, k_dim, v_dim, gap, dtype, device)

        module.scatter_kv(k, v, loc, *our_pools)
        module.scatter_kv_reference(k, v, loc, *their_pools)

        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 8)}, r"k: expected float32 \[2, 3, 4\] on cpu"),
        ({"k": torch.zeros(3, 3, 4)}, r"k: expected float32 \[2, 3, 4\] on cpu"),
        ({"k": torch.zeros(2, 3, 4).half()}, "k: expected float32 .* got float16"),
        ({"v": torch.zeros(2, 2, 4)}, r"v: expected float32 \[2, 3, 4\]"),
        ({"v": torch.zeros(2, 3, 4, device="meta")}, "on cpu, got float32"),
        ({"k": torch.zeros(2, 3, 8)[:, :, ::2]}, "k: expected stride 1 in the last dimension"),
        ({"k_pool": torch.zeros(6, 12)}, r"k_pool: expected float32 \[any, any, any\]"),
        ({"v_pool": torch.zeros(6, 3, 8)[:, :, ::2]}, "v_pool: expected stride 1"),
        ({"v_pool": torch.zeros(5, 3, 4)}, "v: expected 3 heads and 6 slots as k, got 3 and 5"),
        ({"k_pool": torch.zeros(6, 3, 4, dtype=torch.complex64)}, "no kernel moves"),
        (
            {"v": torch.zeros(2, 3, 0), "v_pool": torch.zeros(6, 3, 0)},
            r"v_pool: expected heads and elements, got \[6, 3, 0\]",
        ),
        ({"loc": torch.zeros(2)}, "loc: expected int32 or int64"),
        ({"loc": torch.zeros(2, 1, dtype=torch.int64)}, "loc: expected int32 or int64"),
        ({"loc": torch.tensor([0, 6])}, r"loc: expected ids in \[0, 6\), got 0 to 6"),
        ({"loc": torch.tensor([-1, 0])}, r"loc: expected ids in \[0, 6\), got -1 to 0"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(change, message):
    call = {
        "k": torch.zeros(2, 3, 4),
        "v": torch.zeros(2, 3, 4),
        "loc": torch.tensor([1, 2]),
        "k_pool": torch.zeros(6, 3, 4),
        "v_pool": torch.zeros(6, 3, 4),
    }

    with pytest.raises(ValueError, match=message) as caught:
        scatter_kv(**call | change)

    assert "\n" not in str(caught.value)


def test_without_cuda_and_interpreter_the_reference_answers():
    _, k_pool, v_pool = pools_of(4, 1, 2, 2, 0, torch.float32, "cpu")
    k, v = torch.ones(2, 1, 1, 2)

    scatter_kv(k, v, torch.tensor([3]), k_pool, v_pool)

    assert (k_pool[3] == 1).all() and (v_pool[3] == 1).all()
    assert k_pool[:3].isnan().all() and v_pool[:3].isnan().all()
