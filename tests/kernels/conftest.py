"""Our kernels run twice: in Triton's interpreter on the host, and on CUDA where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import triton
import triton.experimental.gluon  # looks at tl.cdiv when first imported
import triton.language as tl
from triton import knobs

from tests.kernels.interpreter import interpreted

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def interpreted_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own library, ``tl.cdiv`` and the like, was decorated when Triton was imported."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        for module in (tl, tl.standard):
            for name, item in list(vars(module).items()):
                if isinstance(item, triton.JITFunction):
                    monkeypatch.setattr(module, name, triton.jit(item.fn))


@pytest.fixture
def load(device: str, request: pytest.FixtureRequest) -> Callable[[str], ModuleType]:
    """Kernel module by name, fit for ``device``."""
    fit = importlib.import_module
    if device == "cpu":
        request.getfixturevalue("interpreted_language")
        fit = interpreted
    return lambda name: fit(f"sglang_jenga.kernels.{name}")
