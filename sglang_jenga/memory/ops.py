"""What the pool does to its bytes: `ops_of` chooses how, once, when the pool is built.

    CudaOps         our Triton kernels, word by word, on the stream that is current
    InterpretedOps  the same kernels in Triton's interpreter, where TRITON_INTERPRET=1
    HostOps         the same in plain torch, on words

None but `wait` makes the host wait for the device. What a buffer is cut in: run i is bytes
``[i * stride, i * stride + size)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.utils.common import is_pin_memory_available

from sglang_jenga.kernels.copy_entries import copy_entries, copy_entries_reference
from sglang_jenga.kernels.launch import are_interpreted
from sglang_jenga.kernels.launch import words as words  # for the buffer's views
from sglang_jenga.kernels.zero_pages import zero_pages, zero_pages_reference


class HostOps:
    """On host memory, where there is one stream."""

    def __init__(self, device: str) -> None:
        self.device = device

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor beside the bytes; one that lies there already as it is."""
        return tensor.to(self.device)

    @contextmanager
    def behind(self, stream: Any, *used: torch.Tensor) -> Iterator[None]:
        """Inside, work is queued on ``stream``, behind what is on it and behind what the current
        stream has queued so far, the making of the ``used`` tensors too; None: the current one."""
        yield

    def wait(self, stream: Any) -> None:
        """Return when all is done that ``stream`` has been given; None: the current one."""

    def zero(self, pool: torch.Tensor, ids: torch.Tensor, size: int, stride: int) -> None:
        """Fill the runs ``ids``, ``[count]`` integers beside the bytes, with zero bytes."""
        zero_pages_reference(pool, ids, size, stride)

    def copy(
        self, pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, size: int, stride: int
    ) -> None:
        """Copy run ``src[i]`` over run ``dst[i]``; a target is named once and is no source."""
        copy_entries_reference(pool, src, dst, size, stride)


class InterpretedOps(HostOps):
    """The kernels themselves, line by line, on host memory: slow, for tests."""

    def zero(self, pool: torch.Tensor, ids: torch.Tensor, size: int, stride: int) -> None:
        zero_pages(pool, ids, size, stride)

    def copy(
        self, pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, size: int, stride: int
    ) -> None:
        copy_entries(pool, src, dst, size, stride)


class CudaOps(InterpretedOps):
    """The kernels on a card. ``streams``: torch's module of the device."""

    def __init__(self, device: str, streams: Any) -> None:
        super().__init__(device)
        self._streams = streams
        self._pins = is_pin_memory_available(device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cpu and self._pins:
            tensor = tensor.pin_memory()  # an unpinned copy would wait for the forward in flight
        return tensor.to(self.device, non_blocking=True)

    @contextmanager
    def behind(self, stream: Any, *used: torch.Tensor) -> Iterator[None]:
        if stream is None:
            yield
            return
        stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(stream):
            yield
        for tensor in used:
            tensor.record_stream(stream)

    def wait(self, stream: Any) -> None:
        (self._streams.current_stream() if stream is None else stream).synchronize()


def ops_of(device: str) -> HostOps:
    """What serves on ``device``, SGLang's name of it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return CudaOps(device, torch.get_device_module(device))
    return InterpretedOps(device) if are_interpreted() else HostOps(device)
