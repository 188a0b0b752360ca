"""What FlashInfer is told to read: SGLang's own backend and `kernels/attention.py` name the same
slots for the same requests, in full layers and in window layers.

SGLang plans token by token, whatever the page size; ours names pages. Its kernel that gathers the
slots runs in Triton's interpreter, which does not put back all that it patches of Triton: this
module comes after those that compile.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from triton import knobs

from sglang_jenga.kernels.attention import PagedPlan, plan_full, plan_window
from sglang_jenga.testing.context import Settings
from tests.faces.conftest import _sglang  # noqa: F401  a server's configuration, for this module
from tests.faces.pools import Shape
from tests.faces.rig import Rig

WINDOW = 7  # tokens that a query sees, its own included
LENGTHS = {1: [40, 25, 3], 16: [90, 25, 16], 64: [200, 70, 3]}


@pytest.fixture(scope="module")
def gather():
    """A private copy of SGLang's kernel, decorated for Triton's interpreter."""
    spec = importlib.util.find_spec("sglang.kernels.ops.attention.kv_indices")
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module.create_flashinfer_kv_indices_triton


def serving(page_size: int) -> Rig:
    """A server of full and window layers with requests in the middle of their answers."""
    shape = Shape(full=3, window_k=2, window=WINDOW, num_large=600 // page_size + 20, num_rows=4)
    rig = Rig(shape._replace(context=512), Settings(page_size=page_size, chunk=None), check=False)
    rig.ask([1, 2, 0, 1], 12)
    for number, length in enumerate(LENGTHS[page_size]):
        rig.submit([number % 3, *[1, 0, 2, 2, 0][: length % 5]] + [1, 2] * (length // 2), 30)
    rig.turn(9)
    assert len(rig.scheduler.running_batch.reqs) == 3
    return rig


def sglangs(rig: Rig, gather, lengths: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """Slots per request that SGLang's planner gives to a decode's two wrappers: window, full."""
    from sglang.srt.layers.attention import flashinfer_backend
    from sglang.srt.mem_cache import kv_index_translator

    pools, told = rig.pools, []
    translator = kv_index_translator.KVIndexTranslator(
        req_to_token=pools.rows.req_to_token,
        token_to_kv_pool_allocator=pools.allocator,
        token_to_kv_pool=None,
        page_size=pools.cache.page_size,
        device="cpu",
    )
    mapping = pools.allocator.full_to_swa_index_mapping
    pool = SimpleNamespace(translate_loc_from_full_to_swa=lambda slots: mapping[slots.long()])

    class Wrapper:
        is_cuda_graph_enabled = True  # so that it lends the buffer, and nothing asks for a card

        def __init__(self) -> None:
            self._paged_kv_indices_buf = torch.zeros(4096, dtype=torch.int32)

        def begin_forward(self, indptr, indices, last_page_len, *heads, **options) -> None:
            assert heads[3] == 1 and (last_page_len == 1).all()  # a page is a token
            told.append([indices[a:b].long() for a, b in pairwise(indptr)])

    updater = object.__new__(flashinfer_backend.FlashInferIndicesUpdaterDecode)
    updater.sliding_window_size = WINDOW - 1
    updater.attn_backend = SimpleNamespace(kv_index_translator=translator)
    updater.kv_indptr = [torch.zeros(5, dtype=torch.int32) for _ in range(2)]
    updater.kv_last_page_len = torch.ones(4, dtype=torch.int32)
    updater._swa_kv_pool = pool
    updater.num_qo_heads = updater.num_kv_heads = updater.head_dim = 1
    updater.data_type = updater.q_data_type = torch.float32
    plan = kv_index_translator.KVLocPlan(
        source=translator,
        req_pool_indices=rows,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        write_virtual=None,
    )
    with mock.patch.object(kv_index_translator, "create_flashinfer_kv_indices_triton", gather):
        updater.update_sliding_window(
            lengths,
            lengths,
            int(lengths.sum()),
            [Wrapper(), Wrapper()],
            None,
            None,
            plan=plan,
            req_pool_indices=rows,
        )
    return told


def slots_of(plan: PagedPlan, index: int, page_size: int) -> np.ndarray:
    """The slots of one request's pages, the last page up to where it counts."""
    pages = plan.indices[plan.indptr[index] : plan.indptr[index + 1]].astype(np.int64)
    slots = (pages[:, None] * page_size + np.arange(page_size)).ravel()
    return slots[: slots.size - page_size + plan.last_page_len[index]]


@pytest.mark.parametrize("page_size", LENGTHS)
def test_both_name_the_same_slots(gather, interpreted_language, page_size: int):
    with serving(page_size) as rig:
        reqs, tables = rig.scheduler.running_batch.reqs, rig.pools.allocator.tables.rows
        rows = np.array([req.kv.req_pool_idx for req in reqs])
        lengths = np.array([req.kv.kv_allocated_len for req in reqs])
        windows, full = sglangs(rig, gather, torch.from_numpy(lengths), torch.from_numpy(rows))

        ours_full = plan_full(tables[0], rows, lengths, page_size)
        ours_window = plan_window(tables[1], rows, lengths, page_size, window=WINDOW)

        for index, length in enumerate(lengths.tolist()):
            assert np.array_equal(slots_of(ours_full, index, page_size), full[index].numpy())
            seen = slots_of(ours_window, index, page_size)
            kept = min(length, WINDOW)
            # Pages reach further back than the window, to where FlashInfer's mask ends.
            assert np.array_equal(seen[-kept:], windows[index].numpy())
            assert ours_window.first_positions[index] + seen.size == length
