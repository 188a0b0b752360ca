"""Every kernel runs twice: in Triton's interpreter on host memory, and on CUDA where there is one.

Triton decides on its interpreter when a function is decorated. So the interpreted kernels are a
second copy of their module, decorated under TRITON_INTERPRET=1; what other tests import is as is.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
import triton
import triton.experimental.gluon  # looks at tl.cdiv when first imported
import triton.language as tl
from triton import knobs

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cache
def interpreted(name: str) -> ModuleType:
    """A private copy of a kernel module that runs in Triton's interpreter."""
    spec = importlib.util.find_spec(f"sglang_jenga.kernels.{name}")
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    jitted = [item for item in vars(module).values() if isinstance(item, triton.JITFunction)]
    assert not jitted, "a kernel was not decorated for the interpreter: its test would test nothing"
    return module


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def load(device: str) -> Callable[[str], ModuleType]:
    """Kernel module by name, fit for ``device``."""
    if device == "cpu":
        return interpreted
    return lambda name: importlib.import_module(f"sglang_jenga.kernels.{name}")


@pytest.fixture
def interpreted_language(monkeypatch):
    """Triton's own library, ``tl.cdiv`` and the like, was decorated when Triton was imported."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        for module in (tl, tl.standard):
            for name, item in list(vars(module).items()):
                if isinstance(item, triton.JITFunction):
                    monkeypatch.setattr(module, name, triton.jit(item.fn))
