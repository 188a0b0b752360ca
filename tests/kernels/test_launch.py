"""What the kernels share, and that they compile for GPUs that this machine need not have."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_jenga.kernels.copy_entries import _copy_kernel
from sglang_jenga.kernels.expand import _expand_kernel
from sglang_jenga.kernels.launch import RAW, can_launch, check_tensor, raw, words
from sglang_jenga.kernels.scatter_kv import _scatter_kernel
from sglang_jenga.kernels.selective_scan import _scan_kernel
from sglang_jenga.kernels.zero_pages import _zero_kernel


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(16, 24), (8, 12), (6, 8), (8, 9), (64,)])
def test_words_are_the_widest_that_divide_sizes_and_address(shift, sizes):
    pool = torch.arange(100, dtype=torch.uint8)[shift:]

    view, width = words(pool, *sizes)

    fits = [w for w in RAW if not any(n % w for n in (*sizes, pool.data_ptr()))]
    assert width == max(fits) == view.element_size()
    assert view.data_ptr() == pool.data_ptr()
    assert 0 <= pool.numel() - view.numel() * width < width


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.int64])
def test_raw_keeps_shape_strides_and_memory(dtype):
    tensor = torch.zeros(4, 6, 8).to(dtype)[:, ::2]

    bits = raw(tensor)

    assert (bits.shape, bits.stride(), bits.data_ptr()) == (
        tensor.shape,
        tensor.stride(),
        tensor.data_ptr(),
    )
    assert bits.dtype == RAW[dtype.itemsize]


def test_check_says_what_was_expected_and_what_came():
    tensor = torch.zeros(2, 3)

    check_tensor("x", tensor, (torch.float32,), (2, None), torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        check_tensor("x", tensor, (torch.int32, torch.int64), (2, None), torch.device("meta"))

    assert str(caught.value) == (
        "x: expected int32 or int64 [2, any] on meta, got float32 [2, 3] on cpu"
    )


def test_host_memory_takes_only_interpreted_kernels(load, device):
    if device == "cuda":
        pytest.skip("about host memory")
    host = torch.zeros(1)

    assert can_launch(load("zero_pages")._zero_kernel, host)
    assert isinstance(_zero_kernel, triton.JITFunction) != can_launch(_zero_kernel, host)


ALIGNED = [["tt.divisibility", 16]]
# Strides that Triton folds in because they are 1, odd ones, and ones that allow wide stores.
STRIDES = {"one": "constexpr", "odd": "i32", "long": "i64", "wide": "i32"}


def kernel_cases() -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernel, types of its tensors, and its compile-time values."""
    cases = {}
    for word, block in (("u8", 1), ("i64", 4096)):
        pool = {"pool": f"*{word}"}
        cases[f"zero {word}"] = (_zero_kernel, pool | {"page_ids": "*i64"}, {"BLOCK": block})
        copies = pool | {"src": "*i32", "dst": "*i64"}
        cases[f"copy {word}"] = (_copy_kernel, copies, {"BLOCK": block})
    ids = dict.fromkeys(("page_ids", "window_ids", "indptr", "table", "window_table"), "*i32")
    ids |= dict.fromkeys(("rows", "starts", "ends"), "*i64")
    for page_size, has_window in ((1, False), (3, True), (256, True)):
        values = {"PAGE_SIZE": page_size, "HAS_WINDOW": has_window, "BLOCK": 512}
        cases[f"expand {page_size}"] = (_expand_kernel, ids, values)
    for word, heads, k_dim, v_dim in (("u8", 1, 1, 1), ("i16", 8, 128, 128), ("i32", 3, 5, 7)):
        rows = dict.fromkeys(("k", "v", "k_pool", "v_pool"), f"*{word}") | {"loc": "*i64"}
        values = {"HEADS": heads, "K_DIM": k_dim, "V_DIM": v_dim, "BLOCK": 1024}
        cases[f"scatter {word}"] = (_scatter_kernel, rows, values)
    numbers = dict.fromkeys(("slots", "starts", "snapshot_ends", "snapshot_slots"), "*i32")
    for word, state, snapshots in (("bf16", "fp32", True), ("fp32", "bf16", False)):
        rows = dict.fromkeys(("x", "dt", "gate", "b", "c", "out"), f"*{word}")
        rows |= {"a": "*fp32", "d": "*fp32", "states": f"*{state}", "has_initial": "*u8"}
        values = {"STATE": 16, "HAS_SNAPSHOTS": snapshots, "BLOCK": 32, "BLOCK_STATE": 16}
        cases[f"scan {word}"] = (_scan_kernel, rows | numbers, values)
    return cases


def compiled(name: str, stride: str, capability: int) -> dict[str, str]:
    """A kernel in every language it goes through, ``ttir`` to ``ptx``, machine code behind it."""
    kernel, tensors, values = kernel_cases()[name]
    scalars = [arg for arg in kernel.arg_names if arg not in tensors and arg not in values]
    signature = {
        arg: tensors.get(arg, "constexpr" if arg in values else STRIDES[stride])
        for arg in kernel.arg_names
    }
    constants = values | (dict.fromkeys(scalars, 1) if stride == "one" else {})
    hints = {}
    if stride == "wide":
        aligned = [*tensors, *scalars]
        hints = {(kernel.arg_names.index(arg),): ALIGNED for arg in aligned}
    source = ASTSource(kernel, signature, constants, hints)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert result.asm["cubin"]
    return result.asm


@pytest.fixture
def compiler(tmp_path):
    """The compiler with a cache of its own; it needs no GPU, only ptxas, which Triton brings."""
    if knobs.runtime.interpret:
        pytest.skip("kernels were decorated for the interpreter")
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        yield


@pytest.mark.parametrize("name", kernel_cases())
@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), pytest.param(89, marks=pytest.mark.slow), 90],
)
def test_kernel_compiles_for_every_kind_of_stride(compiler, name, capability):
    for stride in STRIDES:
        compiled(name, stride, capability)


@pytest.mark.parametrize("name", ["zero i64", "copy i64", "scatter i16"])
def test_aligned_pools_are_moved_16_bytes_at_a_time(compiler, name):
    stores = re.findall(r"st\.global\.\S+", compiled(name, "wide", 90)["ptx"])

    assert stores
    assert set(stores) <= {"st.global.v2.b64", "st.global.v4.b32"}


@pytest.mark.parametrize("name", kernel_cases())
def test_no_stride_is_multiplied_in_32_bits(compiler, name):
    """Strides and ids may each fit 32 bits where the address does not."""
    lines = compiled(name, "odd", 80)["ttir"].splitlines()
    products = [line for line in lines if "arith.muli" in line]

    narrow = [line for line in products if "i64" not in line]

    assert len(products) > len(narrow)
    # In 32 bits only a program's number times its block, which is a constant.
    assert all(re.search(r", %c\d+_i32 : i32 ", line) for line in narrow), narrow
