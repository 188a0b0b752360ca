"""Plain-torch references of the `sgl_kernel` CPU operators that SGLang's CPU engine calls.

PyPI's `sglang-kernel` holds CUDA operators only, and without a GPU its one library does not even
load (`libcuda.so.1`), so `import sgl_kernel` fails and SGLang with it. Its loader has a last
resort, `import common_ops`: this file answers that import when nothing else did, and defines what
is missing. A real operator is never overridden; with a real library nobody asks here.

SGLang's scheduler process imports `sgl_kernel` before it loads plugins, and so does `sgl.Engine`.
`install_if_needed` is therefore an entry point of torch's own group `torch.backends` too, which
`import torch` runs in every process. It costs nothing unless SGLANG_USE_CPU_ENGINE=1.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # at run time only inside functions: `import torch` itself imports this file

_LAST_RESORT = "common_ops"
_library: torch.library.Library | None = None


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write `out_cache_loc`, the requests' new slots one after the other, into their rows.

    Mutates `req_to_token[req_pool_indices[i], start_offset[i]:end_offset[i]]`.
    """
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        count = max(end - start, 0)
        req_to_token[row, start : start + count] = out_cache_loc[taken : taken + count]
        taken += count


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows `src_loc` to rows `tgt_loc` in every buffer; a row is `strides[i]` bytes.

    All sources are read before the first write, as the two may overlap.
    """
    sources, targets = src_loc.tolist(), tgt_loc.tolist()
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + source * stride, stride) for source in sources]
        for target, row in zip(targets, rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


IMPLEMENTED: dict[str, tuple[str, Callable]] = {
    "assign_req_to_token_pool_cpu": (
        "(Tensor req_pool_indices, Tensor(a!) req_to_token, Tensor start_offset,"
        " Tensor end_offset, Tensor out_cache_loc, SymInt pool_len) -> ()",
        assign_req_to_token_pool_cpu,
    ),
    "copy_all_layer_kv_cache_cpu": (
        "(Tensor data_ptrs, Tensor strides, Tensor tgt_loc, Tensor src_loc) -> ()",
        copy_all_layer_kv_cache_cpu,
    ),
}

# SGLang modules look these up while they are imported, so the name must exist even where no model
# calls it. Nothing else belongs here: SGLang takes some fast paths just because a name exists.
IMPORTED_ONLY = (
    "fused_dual_residual_rmsnorm_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "rmsnorm_cpu",
)


def cpu_engine_requested() -> bool:
    """Read the variable as `sglang.srt.utils.is_cpu` does; importing SGLang here is too early."""
    return os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1"


def install_if_needed() -> None:
    """Make `import sgl_kernel` and its CPU operators work, if the CPU engine is asked for.

    Idempotent, and cheap: operators are defined when `sgl_kernel` is first imported.
    """
    if cpu_engine_requested() and _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def complete() -> None:
    """Define the CPU operators that a `sgl_kernel` with a library of its own lacks.

    That is for a machine with a GPU on which the CPU engine is asked for: the CUDA library
    loads, the last resort is not reached. For plugin load time; too heavy for `import torch`.
    """
    if not cpu_engine_requested():
        return
    install_if_needed()
    if importlib.util.find_spec("sgl_kernel") is not None:
        importlib.import_module("sgl_kernel")
        define_missing_operators()


def define_missing_operators() -> list[str]:
    """Define what `torch.ops.sgl_kernel` lacks and return the names; real ones stay."""
    global _library
    import torch

    namespace = torch.ops.sgl_kernel
    defined = []
    if _library is None:
        _library = torch.library.Library("sgl_kernel", "FRAGMENT")
    from sglang_jenga.cpu import state_operators

    for name, (schema, function) in (IMPLEMENTED | state_operators.OPERATORS).items():
        if not hasattr(namespace, name):
            _library.define(name + schema)
            _library.impl(name, function, "CPU")
            defined.append(name)
    state_operators.DEFINED.update(state_operators.OPERATORS.keys() & set(defined))
    for name in IMPORTED_ONLY:
        if not hasattr(namespace, name):
            setattr(namespace, name, _unavailable(name))
            defined.append(name)
    return defined


def _unavailable(name: str) -> Callable:
    def operator(*args, **kwargs):
        raise RuntimeError(
            f"torch.ops.sgl_kernel.{name} has no implementation here: this sgl_kernel ships no CPU"
            " operators and sglang-jenga brings no reference of this one"
        )

    operator.__name__ = name
    return operator


class _LastResortFinder:
    """Answers `import common_ops` after every other finder has failed to."""

    def find_spec(self, name: str, path=None, target=None):
        if name != _LAST_RESORT:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=__file__)

    def create_module(self, spec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = __file__  # sgl_kernel's loader logs it
        define_missing_operators()
        # SGLang compiles a rope here and there: 20 s at the first request, and a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


_FINDER = _LastResortFinder()
