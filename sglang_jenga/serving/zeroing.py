"""Moments at which the pool's bytes are not what its books say: they are zeroed then.

Padding reads the null pages of every format, and kernels that load whole pages multiply what they
mask by 0, so all that nobody has written has to read as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE

from sglang_jenga.serving.allocator import is_ours


def after_capture(result: Any, self: Any, *_: Any, **__: Any) -> None:
    """Warm-up and capture of CUDA graphs have run forwards on rows of padding."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return
    allocator.buffer.zero_null_pages()
    torch.get_device_module(allocator.device).synchronize()  # before another stream forwards


def after_resume(result: Any, self: Any, recv_req: Any) -> None:
    """SGLang's memory saver gives memory back to the card and later takes other memory, which holds
    anything. The cache was flushed when it went."""
    scheduler = self.scheduler
    given_back = not recv_req.tags or GPU_MEMORY_TYPE_KV_CACHE in recv_req.tags
    if not given_back or not is_ours(scheduler.token_to_kv_pool_allocator):
        return
    allocator = scheduler.token_to_kv_pool_allocator
    allocator.buffer.bytes.zero_()
    allocator.core.large.forget_formats()
    scheduler.req_to_token_pool.req_to_token.zero_()  # row 0 is padding's: it leads to slot 0
    torch.get_device_module(allocator.device).synchronize()
