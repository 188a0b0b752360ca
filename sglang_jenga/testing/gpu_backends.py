"""Which attention backends this machine's GPU and packages have."""

from __future__ import annotations

import importlib.util
import shutil


def missing(backend: str) -> str | None:
    """Why a backend cannot be had here; None if it can."""
    if backend == "flashinfer" and not (
        importlib.util.find_spec("flashinfer") and shutil.which("nvcc")
    ):
        return "FlashInfer and a CUDA compiler for it are needed"
    if backend == "fa3":
        import torch

        if torch.cuda.get_device_capability()[0] != 9:
            return "FlashAttention 3 is for Hopper"
        if not importlib.util.find_spec("sgl_kernel.flash_ops"):
            return "FlashAttention 3 comes with sglang-kernel's libraries"
    return None
