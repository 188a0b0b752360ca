"""What a GPU would do beside the scheduler: moving and clearing bytes, which nobody reads here.

On the CPU it would be done at once and on the scheduler's thread, and be taken for its work.
"""

from __future__ import annotations

from typing import Any

from sglang_jenga.boot.hooks import Hook

_UNIFIED = "sglang.srt.mem_cache.unified_memory_pool"
_COPY = "(self, src_indices, dst_indices)"


def _nothing(*_: Any, **__: Any) -> None: ...


HOOKS = tuple(
    Hook(target, "replace", signature, _nothing)
    for target, signature in (
        (
            f"{_UNIFIED}.UnifiedMHATokenToKVPool.move_physical_pages",
            "(self, tgt_pages, src_pages, page_size)",
        ),
        (f"{_UNIFIED}.UnifiedMHATokenToKVPool.zero_physical_pages", "(self, phys_pages)"),
        (f"{_UNIFIED}.UnifiedMambaPool.move_kv_cache", "(self, tgt_loc, src_loc)"),
        (f"{_UNIFIED}.UnifiedMambaPool.copy_from", _COPY),
        ("sglang.srt.mem_cache.memory_pool.MambaPool.copy_from", _COPY),
        ("sglang_jenga.memory.state.JengaStatePool.copy_from", _COPY),
        ("sglang_jenga.memory.buffer.PoolBuffer.zero_large_pages", "(self, large_ids, stream)"),
    )
)
