"""SGLang's own kernels of recurrent states, interpreted, on a pool's states, which lie far apart:
as on states side by side, to the bit, and of the pool no other byte changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.memory import guarded_states
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.memory.ops import ops_of
from sglang_jenga.memory.state import JengaStatePool, StateShape
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup
from tests.kernels.interpreter import interpreted

pytestmark = [
    pytest.mark.usefixtures("interpreted_language"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.device`, with which a kernel is launched on a card, has no fellow on the host."""
    monkeypatch.setattr(torch.cpu, "device", lambda index: nullcontext(), raising=False)


LAYERS, LAYER = (0, 1, 3), 1  # with states; the one that a kernel of one layer works on
DIM, WIDTH = 12, 4
HEADS, INNER, STATE = 4, 8, 16  # Mamba-2's heads, head_dim and dstate; GDN's HV, V and K
SLOTS = (5, 2, 9, 7, 3, 8)
Tensors = list[torch.Tensor]
# conv states, recurrent states, both [layers, slots, ...], and the slots by number of the request
Run = Callable[[torch.Tensor, torch.Tensor, list[int]], Tensors]


class Random:
    """The same inputs for both sides."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)


def _indices(*slots: int) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32)


def _mamba(name: str) -> object:
    return interpreted(f"sglang.kernels.ops.mamba.{name}")


def _conv_prefill(conv: torch.Tensor, slots: list[int], *, channel_last: bool) -> Tensors:
    random, lengths = Random(), [5, 1, 3, 11]
    x = random(DIM, sum(lengths), dtype=torch.float16)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    out = _mamba("causal_conv1d_triton").causal_conv1d_fn(
        x.t().contiguous().t() if channel_last else x,
        random(DIM, WIDTH, dtype=torch.float16),
        random(DIM, dtype=torch.float16),
        conv[LAYER],
        starts,
        lengths,
        cache_indices=_indices(slots[0], slots[1], -1, slots[2]),
        has_initial_state=torch.tensor([True, False, True, True]),
    )
    padded = slice(int(starts[2]), int(starts[3]))  # nobody writes there
    out[:, padded] = 0
    return [out]


def conv_prefill(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    return _conv_prefill(conv, slots, channel_last=True)


def conv_prefill_of_lfm2(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    return _conv_prefill(conv, slots, channel_last=False)


def conv_decode(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    random = Random()
    out = _mamba("causal_conv1d_triton").causal_conv1d_update(
        random(4, DIM, dtype=torch.float16),
        conv[LAYER],
        random(DIM, WIDTH, dtype=torch.float16),
        random(DIM, dtype=torch.float16),
        activation="silu",
        conv_state_indices=_indices(slots[0], -1, slots[1], slots[2]),
    )
    return [out[[0, 2, 3]]]


def mamba2_decode(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    random, groups = Random(), 2
    out = torch.zeros(4, HEADS, INNER)
    _mamba("triton_ops.mamba_ssm").selective_state_update(
        temporal[LAYER],
        random(4, HEADS, INNER),
        random(4, HEADS, 1).expand(-1, -1, INNER),
        -random(HEADS, 1, 1).abs().expand(-1, INNER, STATE),
        random(4, groups, STATE),
        random(4, groups, STATE),
        random(HEADS, 1).expand(-1, INNER),
        dt_bias=random(HEADS, 1).expand(-1, INNER),
        dt_softplus=True,
        state_batch_indices=_indices(slots[0], slots[1], -1, slots[2]),
        out=out,
    )
    return [out[[0, 1, 3]]]


def mamba1_decode(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    random, dim = Random(), HEADS * INNER
    out = torch.zeros(3, dim)
    _mamba("triton_ops.mamba_ssm").selective_state_update(
        temporal[LAYER].flatten(1, 2),
        random(3, dim),
        random(3, dim),
        -random(dim, STATE).abs(),
        random(3, STATE),
        random(3, STATE),
        random(dim),
        z=random(3, dim),
        dt_bias=random(dim),
        dt_softplus=True,
        state_batch_indices=_indices(*slots[:3]),
        out=out,
    )
    return [out]


def gdn_decode(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    random, queries = Random(), HEADS // 2
    module = interpreted("sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent")
    out = module.fused_sigmoid_gating_delta_rule_update(
        A_log=random(HEADS),
        a=random(4, HEADS),
        dt_bias=random(HEADS),
        softplus_beta=1.0,
        softplus_threshold=20.0,
        q=random(1, 4, queries, STATE),
        k=random(1, 4, queries, STATE),
        v=random(1, 4, HEADS, INNER),
        b=random(4, HEADS),
        initial_state_source=temporal[LAYER],
        initial_state_indices=_indices(slots[0], slots[1], -1, slots[2]),
        cu_seqlens=torch.arange(5, dtype=torch.int32),
        use_qk_l2norm_in_kernel=True,
    )
    return [out[:, [0, 1, 3]]]


def jet_recurrence(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    """Two prompts, a padded row and a step of decoding, which are one operator there."""
    random, queries, lengths = Random(), HEADS // 2, [5, 1, 1, 3]
    module = interpreted("sglang.kernels.ops.attention.fla.fused_recurrent")
    module.exp = lambda x: module.tl.exp(x)  # bound where the interpreter does not see it
    tokens = sum(lengths)
    out = guarded_states.fused_recurrent_gated_delta_rule_update(
        module.fused_recurrent_gated_delta_rule_update,
        q=random(1, tokens, queries, 2 * STATE)[..., ::2],
        k=random(1, tokens, queries, STATE),
        v=random(1, tokens, HEADS, INNER),
        g=-random(1, tokens, HEADS).abs(),
        beta=random(1, tokens, HEADS).sigmoid(),
        initial_state_source=temporal[LAYER],
        initial_state_indices=_indices(slots[0], slots[1], -1, slots[2]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        use_qk_l2norm_in_kernel=True,
    )
    return [out]


def tracking(conv: torch.Tensor, temporal: torch.Tensor, slots: list[int]) -> Tensors:
    """Of every layer the states of the first and third request."""
    _mamba("mamba_state_scatter_triton").track_mamba_states_all_layers(
        conv,
        temporal,
        _indices(*slots[:3]),
        torch.tensor([True, False, True]),
        _indices(*slots[3:]),
        3,
    )
    return []


KERNELS: tuple[Run, ...] = (
    conv_prefill,
    conv_prefill_of_lfm2,
    conv_decode,
    mamba2_decode,
    mamba1_decode,
    gdn_decode,
    jet_recurrence,
    tracking,
)
on_every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda run: run.__name__)


class Pool(NamedTuple):
    buffer: PoolBuffer
    conv: torch.Tensor
    temporal: torch.Tensor


def pool_of(page_size: int, num_bytes: int, place: Path | None = None) -> Pool:
    """States of half and of single precision in large pages that KV has as well. ``place``: of a
    file, a hole of so many bytes."""
    params = SimpleNamespace(
        shape=SimpleNamespace(conv=[(DIM, WIDTH - 1)], temporal=(HEADS, INNER, STATE)),
        dtype=SimpleNamespace(conv=torch.float16, temporal=torch.float32),
    )
    shape, heads = StateShape.of(params, LAYERS), HeadShape(2, 8, 8)
    plan = plan_pool(
        [
            LayerGroup(Full(), (2,), heads.entry_bytes(1, 2), page_size, element="float16"),
            LayerGroup(State(), LAYERS, shape.entry_bytes, element=shape.element),
        ],
        num_bytes,
    )
    buffer = object.__new__(PoolBuffer)
    buffer.plan, buffer.device, buffer.ops = plan, "cpu", ops_of("cpu")
    if place is None:
        buffer.bytes = torch.full((plan.pool_bytes,), 0xFF, dtype=torch.uint8)  # NaN in any type
    else:
        buffer.bytes = torch.from_file(
            str(place), shared=True, size=plan.pool_bytes, dtype=torch.uint8
        )
    states = JengaStatePool(buffer, 1, shape).mamba_cache
    return Pool(buffer, states.conv[0], states.temporal)


def fill(pool: Pool, slots: list[int]) -> None:
    random = Random()
    for view in (pool.conv, pool.temporal):
        view[:, slots] = random(len(LAYERS), len(slots), *view.shape[2:], dtype=view.dtype)


def side_by_side(pool: Pool, slots: list[int]) -> Tensors:
    return [view[:, slots].contiguous() for view in (pool.conv, pool.temporal)]


def check(kernel: Run, pool: Pool, conv: torch.Tensor, temporal: torch.Tensor) -> None:
    """On ``conv`` and ``temporal``, the pool's own, a kernel does what it does on copies."""
    slots = list(SLOTS)
    fill(pool, slots)
    near, before = side_by_side(pool, slots), pool.buffer.bytes.clone()
    expected = kernel(*near, list(range(len(slots))))

    out = kernel(conv, temporal, slots)

    after = pool.buffer.bytes.clone()
    pool.buffer.bytes.copy_(before)
    for view, states in zip((pool.conv, pool.temporal), near, strict=True):
        view[:, slots] = states
    assert torch.equal(after, pool.buffer.bytes)
    assert not torch.equal(after, before)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True))


@pytest.mark.parametrize("page_size", [1, pytest.param(16, marks=pytest.mark.slow)])
@on_every_kernel
def test_a_kernel_does_on_the_pool_what_it_does_on_copies(kernel: Run, page_size: int):
    pool = pool_of(page_size, 1 << 20)
    assert not pool.temporal[LAYER].is_contiguous()

    check(kernel, pool, pool.conv, pool.temporal)


@on_every_kernel
def test_a_kernel_that_takes_states_to_lie_side_by_side_is_found_out(kernel: Run):
    """The fault that this module is about, planted: a layer's states with the slot stride that
    they would have alone."""
    pool = pool_of(1, 1 << 20)
    wrong = [
        view.as_strided(
            view.shape,
            (view.stride(0), view[0, 0].numel(), *view.stride()[2:]),
            view.storage_offset(),
        )
        for view in (pool.conv, pool.temporal)
    ]

    with pytest.raises(AssertionError):
        check(kernel, pool, *wrong)


@on_every_kernel
def test_states_beyond_two_to_the_31_elements_are_the_requests_own(kernel: Run, tmp_path):
    """The buffer is a hole in a file: of its 9 GiB the test touches a few pages."""
    pool = pool_of(16, 9 << 30, tmp_path / "pool")
    last = pool.temporal.shape[1] - 1
    slots = [last - 1, last - 4, last // 2, last, last // 2 + 2, last - 6]
    around = sorted({slot + step for slot in slots for step in (-1, 0, 1) if slot + step <= last})
    assert pool.temporal.stride(1) * slots[0] > 1 << 31
    fill(pool, around)
    near, beside = side_by_side(pool, slots), side_by_side(pool, around)
    expected = kernel(*near, list(range(len(slots))))

    out = kernel(pool.conv, pool.temporal, slots)

    for states, whole in zip(near, beside, strict=True):
        whole[:, [around.index(slot) for slot in slots]] = states
    for now, then in zip(side_by_side(pool, around), beside, strict=True):
        assert torch.equal(now, then)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True))
