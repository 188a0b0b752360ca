"""Which attention backends this machine's GPU and packages have."""

from __future__ import annotations

import importlib.util
import shutil


def missing(backend: str) -> str | None:
    """Why a backend cannot be had here; None if it can."""
    if backend in ("flashinfer", "trtllm_mha") and not (
        importlib.util.find_spec("flashinfer") and shutil.which("nvcc")
    ):
        return "FlashInfer and a CUDA compiler for it are needed"
    if backend in ("trtllm_mha", "fa4"):
        import torch

        if torch.cuda.get_device_capability()[0] < 9:
            return f"{backend} begins with Hopper"
    if backend == "fa4" and not importlib.util.find_spec("flash_attn"):
        return "FlashAttention 4 comes with the package flash-attn-4"
    if backend == "fa3":
        import torch

        if torch.cuda.get_device_capability()[0] != 9:
            return "FlashAttention 3 is for Hopper"
        if not importlib.util.find_spec("sgl_kernel.flash_ops"):
            return "FlashAttention 3 comes with sglang-kernel's libraries"
    return None
