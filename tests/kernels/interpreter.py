"""Kernels in Triton's interpreter, on host memory, while all others stay as they are.

Triton decides on its interpreter when a function is decorated. So an interpreted kernel is a second
copy of its module, decorated under TRITON_INTERPRET=1; what other tests import is as is. A test
that runs one also takes the fixture ``interpreted_language``.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import triton
from triton import knobs


def copy_of(name: str) -> ModuleType:
    """A private copy of a module, ours or SGLang's, as nobody has patched it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def interpreted(name: str) -> ModuleType:
    """A private copy of a module whose kernels are interpreted."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        module = copy_of(name)
    compiled = [item for item in vars(module).values() if isinstance(item, triton.JITFunction)]
    assert not compiled, "a kernel was not decorated for the interpreter: its test would be of none"
    return module
