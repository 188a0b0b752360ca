"""Watch for reads of device tensors on the host, which would wait for the forward in flight."""

from __future__ import annotations

import sys
from pathlib import Path

import sglang_jenga

PACKAGE = Path(sglang_jenga.__file__).resolve().parent
# These run on the CPU engine only, as its kernels: what they read is memory of the host.
KERNELS = PACKAGE / "cpu"
# Reads SGLang's tensors on the host; that it gets no others is a test of its own.
HOST_ARRAYS = PACKAGE / "serving" / "host_arrays.py"
READS = ("cpu", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__index__")


def _ours(path: str) -> bool:
    file = Path(path)
    mine = PACKAGE in file.parents or file.resolve().parent.name == "radix"
    return mine and KERNELS not in file.parents and file != HOST_ARRAYS


def forbid() -> None:
    """Let every read of a tensor raise, in this process, when our own code is the one who reads."""
    import torch

    def guarded(name: str):
        read = getattr(torch.Tensor, name)

        def watch(self, *args, **kwargs):
            caller = sys._getframe(1)
            if _ours(caller.f_code.co_filename):
                where = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
                raise AssertionError(f"{where} reads a device tensor back with {name}")
            return read(self, *args, **kwargs)

        return watch

    for name in READS:
        setattr(torch.Tensor, name, guarded(name))


def forbid_and_plant() -> None:
    """The same, with one read planted in our code, so that a test can see the guard work."""
    from sglang_jenga.serving import cache

    forbid()
    source = "def planted(node, indices):\n    indices.tolist()\n    return indices"
    scope: dict = {}
    exec(compile(source, cache.__file__, "exec"), scope)
    path_device_indices = cache.JengaRadixCache.path_device_indices
    cache.JengaRadixCache.path_device_indices = lambda self, node: scope["planted"](
        node, path_device_indices(self, node)
    )
