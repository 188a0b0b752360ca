"""A stand-in for Mooncake's transfer engine, between two processes of one machine.

Real bytes: the memory of the peer is written with ``process_vm_writev``. So two servers without a
GPU or RDMA run SGLang's own prefill/decode code. Every write is one line of the log, for tests:

    stand-in: 3 writes, 4096 bytes

``JENGA_TEST_TRANSFER_SECONDS``: how long a write takes at least.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)
_MOST = 512  # parts that one call takes
_REGISTERED: dict[int, int] = {}


class _Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _parts(addresses: Sequence[int], lengths: Sequence[int]) -> ctypes.Array:
    pairs = zip(addresses, lengths, strict=True)
    return (_Part * len(lengths))(*(_Part(int(at), int(length)) for at, length in pairs))


class TransferEngine:
    """What `MooncakeTransferEngine` of SGLang calls."""

    def initialize(self, hostname: str, metadata: str, protocol: str, device: str) -> int:
        import torch
        from sglang.srt.disaggregation.mooncake import conn

        if not torch.cuda.is_available():
            # SGLang takes indices off the device here with a CUDA event, and pinned memory.
            conn.MooncakeKVSender.supports_host_tensor_indices = False
            torch.cuda.Event = _NoEvent
        self._seconds = float(os.environ.get("JENGA_TEST_TRANSFER_SECONDS", "0"))
        return 0

    def get_rpc_port(self) -> int:
        """Peers are found by it: the process that owns the memory."""
        return os.getpid()

    def register_memory(self, address: int, length: int) -> int:
        return self.batch_register_memory([address], [length])

    def unregister_memory(self, address: int) -> int:
        return 0

    def batch_register_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> int:
        _REGISTERED.update(zip(addresses, lengths, strict=True))
        print(f"stand-in: {len(addresses)} regions, {sum(lengths)} bytes", flush=True)
        return 0

    def batch_unregister_memory(self, addresses: Sequence[int]) -> int:
        return 0

    def send_probe(self, session: str) -> int:
        return 0 if os.path.exists(f"/proc/{_process(session)}") else -1

    def get_engine(self) -> TransferEngine:
        return self

    def transfer_sync_write(self, session: str, source: int, target: int, length: int) -> int:
        return self.batch_transfer_sync_write(session, [source], [target], [length])

    def batch_transfer_sync_write(
        self, session: str, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """0, or -1 if the peer has gone or does not own that memory."""
        for source, length in zip(sources, lengths, strict=True):
            if not _is_registered(int(source), int(length)):
                print(f"stand-in: {length} bytes at {source} are not registered", flush=True)
                return -1
        time.sleep(self._seconds)
        for at in range(0, len(lengths), _MOST):
            some = slice(at, at + _MOST)
            local, remote = (
                _parts(sources[some], lengths[some]),
                _parts(targets[some], lengths[some]),
            )
            done = _LIBC.process_vm_writev(
                _process(session),
                local,
                ctypes.c_ulong(len(local)),
                remote,
                ctypes.c_ulong(len(remote)),
                ctypes.c_ulong(0),
            )
            if done != sum(map(int, lengths[some])):
                print(f"stand-in: a write failed, errno {ctypes.get_errno()}", flush=True)
                return -1
        print(f"stand-in: {len(lengths)} writes, {sum(map(int, lengths))} bytes", flush=True)
        return 0


class _NoEvent:
    """Of one stream: whatever it stands for has happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, *args: object) -> None:
        pass

    def wait(self, *args: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _process(session: str) -> int:
    return int(session.rsplit(":", 1)[1])


def _is_registered(address: int, length: int) -> bool:
    return any(
        begin <= address and address + length <= begin + size for begin, size in _REGISTERED.items()
    )
