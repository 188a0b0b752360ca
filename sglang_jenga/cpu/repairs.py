"""Repairs of SGLang's CPU engine where it takes for granted what does not hold there.

None of them changes what is computed: without them the models with states do not start, or stop at
their first decode. For scheduler processes of the CPU engine; each may be applied again.
"""

from __future__ import annotations

from typing import Any

import torch


def stay_on_the_cpu() -> None:
    """A CUDA build of torch takes CUDA for granted even where there is no GPU: it names CUDA as its
    device module, which Qwen3-Next's layers ask for the current device, and fails to pin memory,
    which SGLang does to the mask of tracked requests whatever the device."""
    if torch.cuda.is_available():
        return
    original = torch.get_device_module

    def get_device_module(device: Any = None) -> Any:
        return torch.cpu if device is None else original(device)

    def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        return tensor

    torch.get_device_module = get_device_module
    torch.Tensor.pin_memory = pin_memory


def align_no_heads() -> None:
    """SGLang rounds the attention heads up to a multiple of --tp on a CPU, and stops at a model
    that has none."""
    from sglang.srt.model_executor import model_runner

    original = model_runner.adjust_config_with_unaligned_cpu_tp

    def adjust_config_with_unaligned_cpu_tp(
        model_config: Any, load_config: Any, tp_size: int
    ) -> Any:
        if model_config.num_attention_heads is None:
            return model_config
        return original(model_config, load_config, tp_size)

    model_runner.adjust_config_with_unaligned_cpu_tp = adjust_config_with_unaligned_cpu_tp
