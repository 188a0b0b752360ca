"""How often a card would compile a Triton kernel for prompts of different lengths: seconds each.

Triton's launcher runs as on a card, up to where it would compile; that is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sglang_jenga.cpu import conv as reference
from sglang_jenga.memory import conv_copies
from tests.faces.conftest import _sglang  # noqa: F401  with which SGLang's models can be imported
from tests.kernels.interpreter import copy_of

CARD = "a card"  # what Triton's caches know it by
DIM, WIDTH = 64, 3
LENGTHS = (41, 58, 70, 85, 123)  # an argument that is 1, or divides by 16, is a case of its own


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels in the order in which they would be compiled."""
    names: list[str] = []
    functions: set[JITFunction] = set()
    kernel = SimpleNamespace(
        launch_metadata=lambda *_: None,
        run=lambda *_: None,
        function=None,
        packed_metadata=None,
    )

    def compile_(self: JITFunction, key: str, _signature: Any, device: Any, *_: Any) -> Any:
        names.append(self.fn.__name__)
        functions.add(self)
        self.device_caches[device][0][key] = kernel
        return kernel

    card = SimpleNamespace(
        get_current_device=lambda: CARD,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", card)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_)
    yield names
    for function in functions:
        function.device_caches.pop(CARD, None)


class Backend:
    """Stands for SGLang's backend of recurrent layers: one new prompt, and states far apart."""

    def __init__(self, length: int) -> None:
        entry = DIM * (WIDTH - 1) + 64
        self.states = torch.zeros(6 * entry).as_strided((6, DIM, WIDTH - 1), (entry, WIDTH - 1, 1))
        self.length = length

    def conv_state_metadata(self, layer_idx: int, forward_batch: Any) -> Any:
        return SimpleNamespace(
            layer_cache=SimpleNamespace(conv=[self.states]),
            query_start_loc=torch.tensor([0, self.length], dtype=torch.int32),
            cache_indices=torch.tensor([3], dtype=torch.int32),
            has_initial_state=torch.tensor([False]),
        )


def prefill(module: Any, layer_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of SGLang's LFM2 on prompts of every length."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    layer = object.__new__(layer_class)
    torch.nn.Module.__init__(layer)
    layer.layer_idx, layer.conv_bias = 0, None
    layer.conv_weight = torch.ones(DIM, WIDTH)
    layer.in_proj = lambda hidden: (hidden.repeat(1, 3), None)
    layer.out_proj = lambda hidden: (hidden, None)
    for length in LENGTHS:
        monkeypatch.setattr(module, "get_attn_backend", lambda length=length: Backend(length))
        batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, extend_seq_lens_cpu=[length])
        assert layer(torch.ones(length, DIM), batch).shape == (length, DIM)


def on_a_card(has_compiled_kernel: bool) -> Callable[..., torch.Tensor]:
    """SGLang's function that chooses a kernel for a convolution, with the plugin's copies around
    the compiled one. That one cannot run here: plain torch stands for it."""

    def compiled_kernel(x, weight, bias, states, starts, slots, has_initial, silu, pad):
        assert states.is_contiguous()
        x.copy_(
            reference.causal_conv1d_fwd_cpu(
                x, weight, bias, states, starts, slots, has_initial, silu, pad, False
            )
        )

    module = copy_of("sglang.srt.layers.attention.mamba.causal_conv1d")
    module._HAS_CONV1D_KERNEL = has_compiled_kernel
    module.causal_conv1d_fwd = partial(conv_copies.causal_conv1d_fwd, compiled_kernel)
    return module.causal_conv1d_fn


def test_lfm2_compiles_nothing_for_a_new_length(compiled, monkeypatch):
    from sglang.srt.models import lfm2

    monkeypatch.setattr(lfm2, "causal_conv1d_fn", on_a_card(has_compiled_kernel=True))

    prefill(lfm2, lfm2.Lfm2ShortConv, monkeypatch)

    assert compiled == []


def test_without_the_compiled_kernel_each_length_of_lfm2_would_be_compiled(compiled, monkeypatch):
    """So it is where that kernel is switched off for states that lie far apart."""
    from sglang.srt.models import lfm2

    monkeypatch.setattr(lfm2, "causal_conv1d_fn", on_a_card(has_compiled_kernel=False))

    prefill(lfm2, lfm2.Lfm2ShortConv, monkeypatch)

    assert compiled == ["_causal_conv1d_fwd_kernel"] * len(LENGTHS)


def test_lfm2_with_experts_compiles_its_kernel_once(compiled, monkeypatch):
    from sglang.srt.models import lfm2_moe

    kernel = copy_of("sglang.kernels.ops.mamba.lfm_short_conv").fused_lfm_short_conv_prefill
    ours = partial(conv_copies.fused_lfm_short_conv_prefill, kernel)
    monkeypatch.setattr(lfm2_moe, "fused_lfm_short_conv_prefill", ours)
    monkeypatch.setattr(lfm2_moe, "can_dispatch_fused_lfm_short_conv", lambda *_: True)

    prefill(lfm2_moe, lfm2_moe.Lfm2MoeShortConv, monkeypatch)

    assert compiled == ["_lfm_short_conv_prefill_kernel"]


def test_layers_that_tell_lengths_compile_their_convolution_once(compiled):
    """Mamba's and GDN's, by Triton in stock too, on states where they lie."""
    convolve = on_a_card(has_compiled_kernel=True)
    for length in LENGTHS:
        meta = Backend(length).conv_state_metadata(0, None)
        convolve(
            torch.ones(length, DIM).t(),
            torch.ones(DIM, WIDTH),
            query_start_loc=meta.query_start_loc,
            cache_indices=meta.cache_indices,
            has_initial_state=meta.has_initial_state,
            conv_states=meta.layer_cache.conv[0],
            seq_lens_cpu=[length],
        )

    assert compiled == ["_causal_conv1d_fwd_kernel"]
