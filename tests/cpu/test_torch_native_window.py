"""Window layers of a hybrid pool are read at window slots, whatever the free lists did."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool

from sglang_jenga.cpu import window_attention
from sglang_jenga.testing.servers import FAMILY_FLAGS, Server
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.warm import WarmLauncher

FULL_LAYER, WINDOW_LAYER = 0, 1


class FakePool(BaseSWAKVPool):
    """Full slot -> window slot, and which layers are window layers; counts its translations."""

    def __init__(self, mapping):
        self.full_to_swa_index_mapping = mapping
        self.layers_mapping = {FULL_LAYER: (0, False), WINDOW_LAYER: (0, True)}
        self.translations = 0

    def translate_loc_from_full_to_swa(self, kv_indices):
        self.translations += 1
        return self.full_to_swa_index_mapping[kv_indices]


FakePool.__abstractmethods__ = frozenset()


def backend_over(pool, req_to_token):
    return SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=req_to_token)
    )


DECODE = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: True))


def rows_read(backend, layer_id: int, spans, *, cross: bool = False) -> list[list[int]]:
    """What the hooked attention reads for `spans` of (request, start, end)."""

    def attention(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        table = self.req_to_token_pool.req_to_token
        return [table[torch.tensor(r), s : torch.tensor(e)].tolist() for r, s, e in spans]

    layer = SimpleNamespace(layer_id=layer_id, is_cross_attention=cross)
    return window_attention.read_window_rows(
        attention, backend, None, None, None, layer, DECODE, save_kv_cache=True
    )


def shuffled(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(1, 50, (4, 30), generator=generator, dtype=torch.int32)
    mapping = torch.randperm(50, generator=generator)
    return table, mapping


def test_a_window_layer_reads_window_slots_and_a_full_layer_full_slots():
    table, mapping = shuffled()
    backend = backend_over(FakePool(mapping), table)
    spans = [(2, 0, 17), (0, 0, 3)]
    full = [table[r, s:e].tolist() for r, s, e in spans]

    assert rows_read(backend, FULL_LAYER, spans) == full
    assert rows_read(backend, WINDOW_LAYER, spans) == [
        [int(mapping[slot]) for slot in row] for row in full
    ]


def test_cross_attention_and_plain_pools_are_left_alone():
    table, mapping = shuffled()

    assert rows_read(backend_over(FakePool(mapping), table), WINDOW_LAYER, [(1, 0, 9)], cross=True)[
        0
    ] == (table[1, :9].tolist())
    assert rows_read(backend_over(SimpleNamespace(), table), WINDOW_LAYER, [(1, 0, 9)])[0] == (
        table[1, :9].tolist()
    )


def test_text_without_an_image_reads_zeros_of_it_whatever_unwritten_memory_holds():
    prefill = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False),
        encoder_lens_cpu=[0, 68, 0],
        extend_seq_lens_cpu=[3, 2, 1],
    )
    layer = SimpleNamespace(layer_id=FULL_LAYER, is_cross_attention=True)

    def attention(*args, **kwargs):
        return torch.full((6, 4), torch.nan)

    output = window_attention.read_window_rows(
        attention, backend_over(None, None), None, None, None, layer, prefill
    )

    assert output.isnan().all(1).tolist() == [False, False, False, True, True, False]


def test_a_row_is_translated_once_per_forward_and_again_in_the_next():
    table, mapping = shuffled()
    pool = FakePool(mapping)
    backend = backend_over(pool, table)
    for _layer in range(5):
        rows_read(backend, WINDOW_LAYER, [(0, 0, 9), (3, 0, 4)])
    assert pool.translations == 2

    # The next forward: the request's slots moved on, its length did not.
    table[0, :9] = table[1, :9]
    window_attention.forget_rows(backend)

    assert rows_read(backend, WINDOW_LAYER, [(0, 0, 9)])[0] == mapping[table[1, :9].long()].tolist()


def test_the_backend_has_its_own_table_back_after_an_error():
    table, mapping = shuffled()
    backend = backend_over(FakePool(mapping), table)

    with pytest.raises(IndexError):
        rows_read(backend, WINDOW_LAYER, [(99, 0, 1)])

    assert backend.req_to_token_pool.req_to_token is table


@pytest.fixture(scope="module")
def hooked_launcher(tmp_path_factory):
    """Stock SGLang with a plugin that registers the hook alone, and no flag."""
    folder = tmp_path_factory.mktemp("plugin")
    info = folder / "window_hook-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: window_hook\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nwindow_hook = window_hook:register\n"
    )
    (folder / "window_hook.py").write_text(
        "from sglang_jenga.boot import hook_table, hooks\n"
        "def register():\n"
        "    hooks.register(hook_table.CPU_ATTENTION)\n"
    )
    with WarmLauncher({"PYTHONPATH": str(folder)}) as launcher:
        yield launcher


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--page-size", "16"), ("--page-size", "64", "--chunked-prefill-size", "64")]
)
def test_hybrid_memory_answers_like_full_memory(flags, hooked_launcher, tmp_path_factory):
    """Without the hook the third wave of prompts kills the server: a full slot is out of range."""
    model = write_tiny_model("gemma4", tmp_path_factory.getbasetemp() / "gemma4")
    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, 512) for _ in range(draw.choice((30, 90, 170, 260)))] for _ in range(48)
    ]
    flags = (*FAMILY_FLAGS["gemma4"], *flags)
    with Server(model, "--disable-hybrid-swa-memory", *flags, launcher=hooked_launcher) as full:
        expected = [a.output_ids for a in full.generate(prompts, 24, concurrency=4)]
    ratio = ("--swa-full-tokens-ratio", "0.5")
    with Server(model, *ratio, *flags, launcher=hooked_launcher) as hybrid:
        assert "hybrid_swa=True" in hybrid.log()
        answers = [a.output_ids for a in hybrid.generate(prompts, 24, concurrency=4)]

    assert answers == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts)
