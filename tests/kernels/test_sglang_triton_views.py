"""SGLang's own Triton attention, interpreted on the host, over every layout of a pool.

What a GPU would run, line by line, on our strided views: the address arithmetic is the kernels',
the strides are ours, and the null page and all that no query may read is NaN.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType

import pytest
import torch
from _pytest.mark import ParameterSet

from sglang_jenga.testing.attention_batch import Batch, expected, fill
from sglang_jenga.testing.attention_kernels import TRITON_OPS, prepare_triton
from sglang_jenga.testing.attention_layouts import (
    LAYOUTS,
    Attention,
    PagedKV,
    buffer_elements,
    layer_pages,
)
from tests.kernels.interpreter import interpreted

# Scores of a tile that is masked as a whole: -inf less -inf, which the kernels' masks take out.
pytestmark = [
    pytest.mark.usefixtures("interpreted_language"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

WINDOW = 19
FULL = Attention("small", 3, 4, 2, 32)
SLIDING = Attention("small", 4, 2, 2, 16, window=WINDOW)
ODD = Attention("small", 2, 6, 2, 24)  # a head that is no power of two
GROUPS = {"full": FULL, "window": SLIDING, "odd heads": ODD}
PAGE_SIZES = [1, 3, 16, 64]


def cells(shift: int) -> list[ParameterSet]:
    """Every layout, page size and group. Three are quick, with every layout and every group once,
    the others slow: a tile takes the interpreter a second. ``shift``: which group with which."""
    found = []
    for (i, layout), page_size, (j, name) in product(
        enumerate(LAYOUTS), PAGE_SIZES, enumerate(GROUPS)
    ):
        quick = (j - i) % 3 == shift and page_size == PAGE_SIZES[i + shift]
        marks = () if quick else pytest.mark.slow
        case_id = f"{name}-{page_size}-{layout}"
        found.append(pytest.param(layout, page_size, GROUPS[name], marks=marks, id=case_id))
    return found


def interpreted_ops() -> list[ModuleType]:
    """SGLang's two kernel files."""
    return [interpreted(f"sglang.kernels.ops.attention.{name}") for name in TRITON_OPS]


def pool(layout: str, group: Attention, batch: Batch, layer: int) -> tuple[torch.Tensor, PagedKV]:
    """A buffer of NaN, and one layer of it filled."""
    size = buffer_elements(layout, group, batch.num_pages, batch.page_size)
    buffer = torch.full((size + 5,), float("nan"))[5:]  # a pool need not begin its storage
    kv = layer_pages(layout, buffer, group, layer, batch.num_pages, batch.page_size)
    fill(kv)
    return buffer, kv


def check(layout: str, group: Attention, batch: Batch, layer: int) -> None:
    buffer, kv = pool(layout, group, batch, layer)
    before = buffer.view(torch.int32).clone()
    generator = torch.Generator().manual_seed(1)
    shape = (int(batch.q_lens.sum()), group.num_q_heads, group.dim)
    q = torch.randn(shape, generator=generator)
    attend = prepare_triton(batch, group, "cpu", interpreted_ops())

    out = attend(q, kv)

    torch.testing.assert_close(
        out.double(), expected(q, kv, batch, group.window), atol=2e-6, rtol=2e-5
    )
    assert torch.equal(buffer.view(torch.int32), before)


@pytest.mark.parametrize(("layout", "page_size", "group"), cells(0))
def test_sglang_decodes_on_every_layout_as_float64(layout, page_size, group):
    batch = Batch.of([70, 1, WINDOW + 1], [1, 1, 1], page_size, seed=page_size)

    check(layout, group, batch, layer=1)


@pytest.mark.parametrize(("layout", "page_size", "group"), cells(1))
def test_sglang_extends_on_every_layout_as_float64(layout, page_size, group):
    batch = Batch.of([70, 9, WINDOW + 30], [21, 9, 2], page_size, seed=page_size)

    check(layout, group, batch, layer=1)


@pytest.mark.parametrize("layout", ["token-major", "page-layer"])
@pytest.mark.parametrize("page_size", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_sglang_finds_tokens_beyond_two_to_the_31_elements(
    tmp_path, layout, page_size, num_queries
):
    """The buffer is a hole in a file: of its 16 GiB the test touches a few pages."""
    group = Attention("deep", 1 << 22, 4, 2, 32)  # 2 GiB an entry
    batch = Batch.of([6], [num_queries], page_size)
    size = buffer_elements(layout, group, batch.num_pages, page_size)
    assert size > 6 * group.entry > 1 << 31
    buffer = torch.from_file(str(tmp_path / "pool"), shared=True, size=size)
    kv = layer_pages(layout, buffer, group, 7, batch.num_pages, page_size)
    fill(kv)
    q = torch.randn(num_queries, 4, 32, generator=torch.Generator().manual_seed(1))

    out = prepare_triton(batch, group, "cpu", interpreted_ops())(q, kv)

    torch.testing.assert_close(out.double(), expected(q, kv, batch, None), atol=2e-6, rtol=2e-5)
