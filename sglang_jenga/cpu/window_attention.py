"""Make SGLang's `torch_native` attention read window layers of a hybrid pool at the right rows.

`req_to_token` holds slots of the full layers. The backend translates them for the write of a window
layer but not for the read: wrong as soon as the two free lists diverge, an IndexError once a full
slot exceeds the window pool. Backends for GPUs translate both, so only this one is hooked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool


class WindowRows:
    """Stands where the backend expects `req_to_token`, and answers in slots of the window layers.

    The backend asks `rows[request, start:end]` per request and layer; a row is translated once.
    Tokens behind the window may have no slot any more: they map to slot 0, and the mask hides them.
    """

    def __init__(self, pool: BaseSWAKVPool, req_to_token: torch.Tensor):
        self._pool = pool
        self._req_to_token = req_to_token
        self._translated: dict[tuple[int, int, int], torch.Tensor] = {}

    def __getitem__(self, key: tuple[torch.Tensor, slice]) -> torch.Tensor:
        request, tokens = key
        span = (int(request), int(tokens.start), int(tokens.stop))
        rows = self._translated.get(span)
        if rows is None:
            slots = self._req_to_token[span[0], span[1] : span[2]].long()
            rows = self._translated[span] = self._pool.translate_loc_from_full_to_swa(slots)
        return rows


class _WindowReqToTokenPool:
    """The one attribute of a `ReqToTokenPool` that the backend reads."""

    def __init__(self, rows: WindowRows):
        self.req_to_token = rows


def forget_rows(backend: TorchNativeAttnBackend, *args, **kwargs) -> None:
    # Once per forward, before the first layer. A row may have got other slots since the last one.
    backend._jenga_window_rows = None


def read_window_rows(original, backend: TorchNativeAttnBackend, q, k, v, layer, *args, **kwargs):
    if layer.is_cross_attention:
        output = original(backend, q, k, v, layer, *args, **kwargs)
        return _zero_without_image(output, *args, **kwargs)
    if not _is_window_layer(backend.token_to_kv_pool, layer.layer_id):
        return original(backend, q, k, v, layer, *args, **kwargs)
    full_rows = backend.req_to_token_pool
    rows = getattr(backend, "_jenga_window_rows", None)
    if rows is None:
        rows = _WindowReqToTokenPool(
            WindowRows(backend.token_to_kv_pool, full_rows.req_to_token),
        )
        backend._jenga_window_rows = rows
    backend.req_to_token_pool = rows
    try:
        return original(backend, q, k, v, layer, *args, **kwargs)
    finally:
        backend.req_to_token_pool = full_rows


def _zero_without_image(output, forward_batch, *args, **kwargs):
    """Of a request without an image the backend asks for attention over no keys, with rows of
    uninitialised memory beside the request's own. One NaN among those makes all of them NaN, and
    the model takes them times 0."""
    if not forward_batch.forward_mode.is_decode():
        spans = zip(forward_batch.encoder_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        at = 0
        for encoder, count in spans:
            if not encoder:
                output[at : at + count] = 0
            at += count
    return output


def _is_window_layer(pool, layer_id: int) -> bool:
    from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool

    if not isinstance(pool, BaseSWAKVPool):
        return False
    if getattr(pool, "full_to_swa_index_mapping", None) is None:
        return False
    return pool.layers_mapping[layer_id][1]
