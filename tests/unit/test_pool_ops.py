"""How a pool works on its bytes is chosen once, and is the same work wherever it runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from sglang_jenga.memory import ops
from sglang_jenga.memory.ops import CudaOps, HostOps, InterpretedOps, ops_of
from tests.kernels.interpreter import interpreted

SIZE, STRIDE = 24, 32


def pool() -> torch.Tensor:
    return torch.arange(8 * STRIDE, dtype=torch.uint8) % 251


@pytest.fixture
def kernels(monkeypatch):
    """The seam with the kernels of a process that was started under TRITON_INTERPRET=1."""
    monkeypatch.setattr(
        ops, "zero_pages", interpreted("sglang_jenga.kernels.zero_pages").zero_pages
    )
    monkeypatch.setattr(
        ops, "copy_entries", interpreted("sglang_jenga.kernels.copy_entries").copy_entries
    )


def test_the_device_chooses_and_on_the_host_tritons_interpreter():
    assert type(ops_of("cpu")) is HostOps
    assert type(ops_of("cuda")) is CudaOps
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        assert type(ops_of("cpu")) is InterpretedOps
        assert type(ops_of("cuda:1")) is CudaOps


def test_kernels_and_plain_torch_leave_the_same_bytes(kernels):
    done = []
    for kind in (HostOps, InterpretedOps):
        work, here = kind("cpu"), pool()
        work.zero(here, torch.tensor([5, 2]), SIZE, STRIDE)
        work.copy(here, torch.tensor([0, 0, 7]), torch.tensor([3, 4, 6]), SIZE, STRIDE)
        done.append(here)

    plain, kernel = done
    assert torch.equal(plain, kernel)
    runs = plain.view(8, STRIDE)
    assert not runs[[2, 5], :SIZE].any()
    assert torch.equal(runs[[3, 4], :SIZE], pool().view(8, STRIDE)[[0, 0], :SIZE])
    assert torch.equal(runs[:, SIZE:], pool().view(8, STRIDE)[:, SIZE:])  # between the runs


def test_on_the_host_states_move_as_words():
    with torch.profiler.profile(record_shapes=True) as profile:
        HostOps("cpu").zero(pool(), torch.tensor([5, 2]), SIZE, STRIDE)

    (fill,) = (event for event in profile.events() if event.name == "aten::index_fill_")
    assert fill.input_shapes[0] == [8, SIZE // 8]


@pytest.mark.parametrize("pins", [True, False])
def test_what_is_sent_to_a_card_is_pinned_where_it_can_be(monkeypatch, pins: bool):
    monkeypatch.setattr(ops, "is_pin_memory_available", lambda device: pins)
    done = []

    def pin_memory(self):
        done.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        done.append((device, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)

    CudaOps("cuda", SimpleNamespace()).upload(torch.tensor([1]))

    assert done == ["pinned"] * pins + [("cuda", True)]
