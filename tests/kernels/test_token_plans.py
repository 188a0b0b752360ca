"""What FlashInfer is told to read: SGLang's own backend and `kernels/attention.py` name the same
slots for the same requests, in full layers and in window layers, for every step of a server.

SGLang plans token by token, whatever the page size; ours names pages. Its kernel that gathers the
slots runs in Triton's interpreter, which does not put back all that it patches of Triton: this
module comes after those that compile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from sglang_jenga.kernels.attention import PagedPlan, plan_full, plan_window
from sglang_jenga.testing.context import Settings
from tests.faces.conftest import _sglang  # noqa: F401  a server's configuration, for this module
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.kernels.interpreter import interpreted

WINDOW = 7  # tokens that a query sees, its own included
CHUNK = {1: 16, 16: 32, 64: 64}
LENGTHS = {1: [40, 25, 3], 16: [90, 25, 16], 64: [180, 70, 3]}
MOST_ROWS = 4


class Told(NamedTuple):
    """What a wrapper of FlashInfer is planned with: the slots of each request, and its options."""

    slots: list[torch.Tensor]
    options: dict[str, Any]


class Wrapper:
    """Stands for FlashInfer's; keeps what it is told."""

    is_cuda_graph_enabled = True  # so that it lends the buffer, and nothing asks for a card

    def __init__(self) -> None:
        self._paged_kv_indices_buf = torch.zeros(4096, dtype=torch.int32)

    def begin_forward(self, *arguments: Any, **options: Any) -> None:
        """A decode's: ``indptr, indices, last_page_len, q_heads, kv_heads, head_dim, page_size``;
        a prefill's begin with those of the queries."""
        *queries, indptr, indices, last_page_len, _, _, _, page_size = arguments
        assert page_size == 1 and (last_page_len == 1).all()  # a page is a token
        self.told = Told([indices[a:b].long() for a, b in pairwise(indptr)], options)
        self.q_lens = [torch.diff(indptr).tolist() for indptr in queries]


class Planner:
    """SGLang's planners of FlashInfer's steps over the rows and slots of a rig."""

    def __init__(self, rig: Rig) -> None:
        from sglang.srt.layers.attention import flashinfer_backend
        from sglang.srt.mem_cache import kv_index_translator

        pools = rig.pools
        self.translator = kv_index_translator.KVIndexTranslator(
            req_to_token=pools.rows.req_to_token,
            token_to_kv_pool_allocator=pools.allocator,
            token_to_kv_pool=None,
            page_size=pools.cache.page_size,
            device="cpu",
        )
        self.has_windows = rig.shape.has_windows

        def windows(slots: torch.Tensor) -> torch.Tensor:
            return pools.allocator.full_to_swa_index_mapping[slots.long()]

        self.decode = object.__new__(flashinfer_backend.FlashInferIndicesUpdaterDecode)
        self.prefill = object.__new__(flashinfer_backend.FlashInferIndicesUpdaterPrefill)
        for updater in (self.decode, self.prefill):
            updater.sliding_window_size = WINDOW - 1
            updater.attn_backend = SimpleNamespace(kv_index_translator=self.translator)
            updater.kv_indptr, updater.qo_indptr = (
                [torch.zeros(MOST_ROWS + 1, dtype=torch.int32) for _ in range(2)] for _ in range(2)
            )
            updater.kv_last_page_len = torch.ones(MOST_ROWS, dtype=torch.int32)
            updater.num_qo_heads = updater.num_kv_heads = updater.head_dim = 1
            updater.data_type = updater.q_data_type = torch.float32
            updater.prefill_wrapper_ragged = SimpleNamespace(begin_forward=lambda *_, **__: None)
            updater._swa_kv_pool = None
            updater.update = updater.update_single_wrapper
            if self.has_windows:
                updater._swa_kv_pool = SimpleNamespace(translate_loc_from_full_to_swa=windows)
                updater.update = updater.update_sliding_window

    def told(self, batch: Any, prefix_lens: torch.Tensor, use_ragged: bool) -> list[Wrapper]:
        """What the wrappers hear of a batch: window layers' and full layers', or these alone."""
        from sglang.srt.mem_cache.kv_index_translator import KVLocPlan

        rows, lengths = batch.req_pool_indices, batch.seq_lens
        wrappers = [Wrapper() for _ in range(2 if self.has_windows else 1)]
        total = int(lengths.sum())
        plan = KVLocPlan(
            source=self.translator,
            req_pool_indices=rows,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            write_virtual=None,
        )
        if batch.forward_mode.is_decode():
            self.decode.update(
                lengths, lengths, total, wrappers, None, None, plan=plan, req_pool_indices=rows
            )
        else:
            self.prefill.update(
                rows, lengths, lengths, total, prefix_lens, wrappers, use_ragged, None, None,
                plan=plan,
            )  # fmt: skip
        return wrappers


def slots_of(plan: PagedPlan, index: int, page_size: int) -> np.ndarray:
    """The slots of one request's pages, the last page up to where it counts."""
    pages = plan.indices[plan.indptr[index] : plan.indptr[index + 1]].astype(np.int64)
    slots = (pages[:, None] * page_size + np.arange(page_size)).ravel()
    return slots[: max(slots.size - page_size, 0) + plan.last_page_len[index]]


def compare(rig: Rig, planner: Planner, batch: Any, use_ragged: bool) -> None:
    """A step's plans, theirs and ours, once its tokens have slots."""
    page_size, decodes = rig.settings.page_size, batch.forward_mode.is_decode()
    tables, rows = rig.pools.allocator.tables.rows, batch.req_pool_indices.numpy()
    lengths = batch.seq_lens.numpy()
    prefixes = lengths - 1 if decodes else np.array(batch.prefix_lens)
    wrappers = planner.told(batch, torch.from_numpy(prefixes), use_ragged)
    queries = lengths - prefixes
    if not decodes:
        assert all(wrapper.q_lens == [queries.tolist()] for wrapper in wrappers)
        if use_ragged:  # the new tokens are not read from the pool
            lengths, queries = prefixes, np.zeros_like(queries)
    full = plan_full(tables[0], rows, lengths, page_size)
    for index, theirs in enumerate(wrappers[-1].told.slots):
        assert slots_of(full, index, page_size).tolist() == theirs.tolist()
    if not planner.has_windows:
        return
    window = plan_window(tables[1], rows, lengths, page_size, window=WINDOW, q_lens=queries)
    for index, theirs in enumerate(wrappers[0].told.slots):
        ours = slots_of(window, index, page_size)
        # Pages reach further back than the window, to where FlashInfer's mask ends.
        kept = min(int(lengths[index]), int(queries[index]) + WINDOW - 1)
        assert ours[ours.size - kept :].tolist() == theirs.tolist()
        assert ours.size - kept < page_size
        assert ours.size == 0 or window.first_positions[index] + ours.size == lengths[index]
    if not (decodes or use_ragged):
        assert wrappers[0].told.options["window_left"] == WINDOW - 1


def serve(shape: Shape, page_size: int, look: Callable[[Rig, Any], None]) -> None:
    """A server's steps: chunks, hits, answers side by side. ``look`` sees each batch when its
    forward begins."""
    shape = shape._replace(num_large=600 // page_size + 20, num_rows=MOST_ROWS, context=512)
    with Rig(shape, Settings(page_size=page_size, chunk=CHUNK[page_size]), check=False) as rig:
        worker = rig.scheduler.model_worker
        forward = worker.forward_batch_generation

        def looked_at(batch: Any, **options: Any) -> Any:
            look(rig, batch)
            return forward(batch, **options)

        with mock.patch.object(worker, "forward_batch_generation", looked_at):
            rig.ask([1, 2, 0, 1] * 20, 12)
            for number, length in enumerate(LENGTHS[page_size]):
                head = [1, 2, 0, 1] * 17 if number == 1 else [number % 3]
                rig.submit([*head, *[1, 0, 2, 2, 0][: length % 5]] + [1, 2] * (length // 2), 30)
            rig.turn(40)


@pytest.mark.parametrize("page_size", LENGTHS)
@pytest.mark.parametrize("window_k", [2, None], ids=["full and window", "full"])
def test_both_name_the_same_slots(interpreted_language, page_size: int, window_k: int | None):
    from sglang.srt.mem_cache import kv_index_translator as translator

    seen: Counter[str] = Counter()
    planners: list[Planner] = []

    def look(rig: Rig, batch: Any) -> None:
        if not planners:
            planners.append(Planner(rig))
        decodes = batch.forward_mode.is_decode()
        for use_ragged in (False,) if decodes else (False, True):
            compare(rig, planners[0], batch, use_ragged)
        seen["decode" if decodes else "prefill"] += 1
        seen["behind a prefix"] += not decodes and any(batch.prefix_lens)
        seen["side by side"] += len(batch.reqs) > 1

    gather = interpreted("sglang.kernels.ops.attention.kv_indices")
    name = "create_flashinfer_kv_indices_triton"
    with mock.patch.object(translator, name, getattr(gather, name)):
        serve(Shape(full=3, window_k=window_k, window=WINDOW), page_size, look)
    assert all(seen[what] > 2 for what in ("decode", "prefill", "behind a prefix", "side by side"))
