"""Finds where the host would wait for a device, in a process that has none.

Storages are named that would lie on the device; whatever is computed from them lies there too. The
product's own lines may then do nothing that reads such a tensor back, or that sends a host tensor
by another way than `ops.upload`, which pins it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sglang_jenga
from sglang_jenga.memory.ops import HostOps

_OURS = str(Path(sglang_jenga.__file__).parent)
_READS = ("_local_scalar_dense", "item", "equal", "is_nonzero")
_SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
"""Operators whose result is as long as the values say."""


class Stall(AssertionError):
    """A line of ours at which the host would wait."""


class Device(TorchDispatchMode):
    """While it is entered, every operator of ours on device tensors is looked at."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            self.put(tensor)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage  # kept, so that no other gets its address
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in given if self.holds(tensor)]
        why = self._why(func.overloadpacket.__name__, given, there) if there else None
        if why is not None and (line := _our_line()) is not None:
            raise Stall(f"{line}: {func} {why}")
        result = func(*args, **kwargs)
        if there:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.put(leaf)
        return result

    def _why(self, name: str, given: list[torch.Tensor], there: list[torch.Tensor]) -> str | None:
        if name in _READS:
            return "reads a value back"
        if name in _SHAPES:
            return "has a shape that the host must ask for"
        masks = [tensor for tensor in given[1:] if tensor.dtype == torch.bool and tensor.dim()]
        if name.startswith("index") and masks:
            return "is given a mask, whose true places the host must count"
        if name in ("index_put", "index_put_") and not self.holds(given[-1]):
            return "copies a value from host memory that is not pinned"
        if any(tensor.dim() and not self.holds(tensor) for tensor in given):
            return "is given a tensor in host memory"
        return None


class Card(HostOps):
    """Uploads as a card's: another copy, on the device."""

    def __init__(self, device: Device) -> None:
        super().__init__("cpu")
        self._card = device
        self.uploads = 0

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._card.holds(tensor):
            return tensor
        self.uploads += 1
        return self._card.put(tensor.clone())


def _our_line() -> str | None:
    """The product's line that has called the operator, None if SGLang or a test has."""
    for frame in _frames():
        name = frame.f_code.co_filename
        if "/torch/" in name or name == __file__:
            continue
        resolved = str(Path(name).resolve())
        ours = name.startswith(_OURS) or "/kernels/" in resolved or "/radix/" in resolved
        return f"{Path(name).name}:{frame.f_lineno}" if ours else None
    return None


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
