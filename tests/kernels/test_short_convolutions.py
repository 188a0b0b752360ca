"""SGLang's kernels of short convolutions see states side by side, however far apart ours lie."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from sglang_jenga.cpu import conv as reference
from sglang_jenga.memory import conv_copies
from tests.kernels.interpreter import interpreted

DIM, WIDTH = 6, 3
SLOTS = [4, 2, -1]  # the last row is padding


def strided(num_slots: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """States ``[num_slots, DIM, WIDTH - 1]`` in a buffer that holds other things between them."""
    entry = DIM * (WIDTH - 1) + 20
    buffer = torch.randn(num_slots * entry, generator=torch.Generator().manual_seed(1)).to(dtype)
    return buffer.as_strided((num_slots, DIM, WIDTH - 1), (entry, WIDTH - 1, 1), 8)


def whole(states: torch.Tensor) -> torch.Tensor:
    """The buffer that they lie in."""
    return torch.empty(0, dtype=states.dtype).set_(states.untyped_storage())


class Compiled:
    """Stands for the compiled kernels, which this machine cannot run: plain torch, and as narrow
    in what states it takes."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def fwd(self, x, weight, bias, states, starts, slots, has_initial, silu, pad):
        assert states.is_contiguous()
        self.seen.append(slots)
        x.copy_(
            reference.causal_conv1d_fwd_cpu(
                x, weight, bias, states, starts, slots, has_initial, silu, pad, False
            )
        )

    def update(self, x, states, weight, bias, silu, lengths, slots, pad):
        assert states.is_contiguous()
        self.seen.append(slots)
        x.copy_(
            reference.causal_conv1d_update_cpu(
                x, states, weight, bias, silu, lengths, slots, pad, False
            )
        )


@pytest.fixture
def weight():
    return torch.randn(DIM, WIDTH, generator=torch.Generator().manual_seed(2))


def test_a_prefill_on_copies_leaves_what_one_in_place_would(weight):
    starts = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
    has_initial = torch.tensor([True, False, True])
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    ours, theirs = strided(), strided()
    x = torch.randn(DIM, 9, generator=torch.Generator().manual_seed(3))
    expected = reference.causal_conv1d_fwd_cpu(
        x, weight, None, theirs, starts, slots, has_initial, False, -1, False
    )
    compiled = Compiled()

    conv_copies.causal_conv1d_fwd(
        compiled.fwd, x, weight, None, ours, starts, slots, has_initial, False, -1
    )

    assert torch.equal(x[:, :6], expected[:, :6])
    assert torch.equal(whole(ours), whole(theirs))  # the states, and all that lies between
    assert [seen.tolist() for seen in compiled.seen] == [[0, 1, -1]]


def test_a_decode_on_copies_leaves_what_one_in_place_would(weight):
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    ours, theirs = strided(), strided()
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(3))
    expected = reference.causal_conv1d_update_cpu(
        x, theirs, weight, None, True, None, slots, -1, False
    )

    conv_copies.causal_conv1d_update(
        Compiled().update, x, ours, weight, None, True, None, slots, -1
    )

    assert torch.equal(x[:2], expected[:2])
    assert torch.equal(whole(ours), whole(theirs))


@pytest.mark.parametrize("slots", [None, torch.tensor([1, 0], dtype=torch.int32)])
def test_states_that_lie_side_by_side_are_not_copied(weight, slots):
    states, seen = torch.zeros(2, DIM, WIDTH - 1), []

    conv_copies.causal_conv1d_update(
        lambda *args: seen.append(args), torch.ones(2, DIM), states, weight, None, False, None,
        slots, -1,
    )  # fmt: skip

    assert seen[0][1] is states and seen[0][6] is slots


def test_a_table_row_leads_each_kernel_here():
    from sglang_jenga.boot import hook_table

    table = [row for row in hook_table.STATES if "conv_copies" in row.value]
    ours = {row.target.rpartition(".")[2]: row for row in table}
    named = {name for name in vars(conv_copies) if name.startswith(("causal_", "fused_"))}

    assert set(ours) == named
    for name, row in ours.items():
        assert (row.kind, row.value) == ("around", f"sglang_jenga.memory.conv_copies:{name}")


# ---- SGLang's Triton kernels of LFM2-MoE, interpreted ------------------------------------------


@pytest.fixture
def lfm() -> ModuleType:
    return interpreted("sglang.kernels.ops.mamba.lfm_short_conv")


@pytest.fixture
def far_apart(tmp_path) -> torch.Tensor:
    """States beyond 2**31 elements; the buffer is a hole in a file of which a few pages exist."""
    stride, num_slots = 1 << 29, 6
    path = str(tmp_path / "pool")
    buffer = torch.from_file(path, shared=True, size=num_slots * stride, dtype=torch.float16)
    states = buffer.as_strided((num_slots, DIM, WIDTH - 1), (stride, WIDTH - 1, 1))
    assert (num_slots - 1) * stride > 1 << 31
    for slot in range(num_slots):
        states[slot] = slot + 1
    return states


def gated(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(count, DIM, generator=generator).half() for _ in "bcx"]


def side_by_side(states: torch.Tensor, slots: list[int]) -> torch.Tensor:
    return torch.stack([states[slot] for slot in slots])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_states_beyond_two_to_the_31_elements_are_the_requests_own(
    lfm, far_apart, weight, interpreted_language, monkeypatch, phase: str
):
    monkeypatch.setattr(
        lfm.tl, "bfloat16", lfm.tl.float16
    )  # numpy has none; the kernel rounds to it
    slots = [5, 2]
    indices = torch.tensor(slots, dtype=torch.int32)
    near = side_by_side(far_apart, slots)
    order = torch.tensor([0, 1], dtype=torch.int32)
    weight = weight.half()
    if phase == "decode":
        tokens, extra, name = gated(2), [], "fused_lfm_short_conv_decode"
        args = lambda where, which: (*tokens, weight, where, which)  # noqa: E731
    else:
        tokens, name = gated(7), "fused_lfm_short_conv_prefill"
        starts, has = torch.tensor([0, 4, 7], dtype=torch.int32), torch.tensor([True, True])
        extra = [has, 4]
        args = lambda where, which: (*tokens, weight, where, starts, which, *extra)  # noqa: E731
    kernel = getattr(lfm, name)
    expected = kernel(*args(near, order))

    out = getattr(conv_copies, name)(kernel, *args(far_apart, indices))

    assert torch.equal(out, expected) and not math.isnan(float(out.sum()))
    assert torch.equal(side_by_side(far_apart, slots), near)
    assert (far_apart[0] == 1).all() and (far_apart[3] == 4).all()
