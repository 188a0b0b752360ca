"""Embeddings of images in the pool of a served model: they take what is idle, and no more."""

from __future__ import annotations

import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.environ import envs

from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

DENSE = Shape(full=1, num_large=41)  # 40 tokens
WINDOWS = Shape(full=3, window_k=2, window=8, num_large=60)
BOTH = pytest.mark.parametrize("shape", [DENSE, WINDOWS], ids=["dense", "windows"])


@contextmanager
def seeing(shape: Shape, settings: Settings | None = None, **options):
    """A rig and the embeddings of the model that it serves."""
    from sglang.srt.managers import mm_schedule

    from sglang_jenga.boot.image_cache import after_build

    before, mm_schedule.embedding_cache = mm_schedule.embedding_cache, None
    with Rig(shape, settings, **options) as rig:
        built = SimpleNamespace(
            token_to_kv_pool_allocator=rig.pools.allocator, tree_cache=rig.pools.cache
        )
        try:
            after_build(built, model_config=SimpleNamespace(is_multimodal=True))
            yield rig, mm_schedule.embedding_cache
        finally:
            mm_schedule.embedding_cache = before


class Image:
    """An item as SGLang's scheduler has it: ``tokens`` from ``start`` on in its prompt."""

    def __init__(self, key: int, start: int, tokens: int) -> None:
        self.hash, self.offsets = key, [(start, start + tokens - 1)]


def embedding(rig: Rig, key: int, larges: int, dtype: torch.dtype = torch.float32):
    """What a vision tower would make of an image: so many large pages of numbers of its own."""
    from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult

    rows = larges * rig.pools.plan.large_page_bytes // 8 // dtype.itemsize
    generator = torch.Generator().manual_seed(key)
    return EmbeddingResult(embedding=torch.randn(rows, 8, generator=generator).to(dtype))


def empty(rig: Rig) -> int:
    return rig.pools.allocator.core.large.num_empty


def step_through(cache, image: Image, computed: int, chunk: int) -> None:
    """SGLang is about to compute a chunk of the image's prompt, its only one."""
    cache.note_chunk([image], [0, 1], [computed], [chunk])


def test_in_a_pipeline_sglang_keeps_embeddings_its_own_way(monkeypatch):
    """Its first stage alone has any: its pool would evict what the others' still hit."""
    from sglang_jenga.boot import image_cache

    monkeypatch.setattr(image_cache, "get_parallel", lambda: SimpleNamespace(pp_size=2))
    made = []
    with seeing(WINDOWS) as (rig, cache):
        image_cache.init_cache(made.append, 100)

        assert cache is None
        assert rig.pools.allocator.embeddings is None
        assert made == [100]
        asked = image_cache.reservation(lambda: envs.SGLANG_VLM_CACHE_SIZE_MB.get())
        assert asked == envs.SGLANG_VLM_CACHE_SIZE_MB.get() > 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_the_tower_made(shape: Shape, dtype: torch.dtype):
    with seeing(shape) as (rig, cache):
        made = {key: embedding(rig, key, 4, dtype) for key in (1, 2)}
        for key, result in made.items():
            assert cache.set(key, result)
        rig.ask(answer([0], 6), 4)

        for key, result in made.items():
            kept = cache.get_single(key).embedding
            assert torch.equal(kept, result.embedding)
            assert kept.dtype == dtype
            # Whoever has it may keep it: it is no view of the pool.
            assert kept.data_ptr() != cache.get_single(key).embedding.data_ptr()
        assert len(cache) == 2
        rig.check_nothing_lost()


def test_several_images_under_one_name_and_what_comes_with_them():
    from sglang.srt.multimodal.evs import EVSEmbeddingResult

    with seeing(DENSE) as (rig, cache):
        made = embedding(rig, 1, 3).embedding
        pruned = EVSEmbeddingResult(embedding=made, num_tokens_per_frame=[4, 2])
        assert cache.get([7, 8]) is None
        assert cache.set(cache.combine_hashes([7, 8]), pruned)

        kept = cache.get([7, 8])

        assert isinstance(kept, EVSEmbeddingResult)
        assert kept.num_tokens_per_frame == [4, 2]
        assert torch.equal(kept.embedding, made)


@BOTH
def test_images_go_before_any_cached_prefix(shape: Shape):
    with seeing(shape) as (rig, cache):
        first, second = answer([0], 14), answer([1], 14)
        rig.ask(first, 2)
        kept = rig.pools.cache.evictable_size()
        assert cache.set(1, embedding(rig, 1, empty(rig)))
        assert rig.pools.cache.evictable_size() == kept, "an image that nobody wants takes no KV"

        rig.ask(second, 2)

        assert not cache.has(1)
        assert rig.ask([*first, 1, 2], 1).hit >= len(first)
        rig.check_nothing_lost()


@BOTH
def test_while_its_prompt_is_in_flight_cached_prefixes_go_before_an_image(shape: Shape):
    with seeing(shape) as (rig, cache):
        while rig.pools.allocator.core.large.num_reclaimable < 12:
            rig.ask(answer([len(rig.asked) % 3, 1, len(rig.asked)], 12), 1)
        image, larges = Image(1, 0, 20), empty(rig) + 4
        step_through(cache, image, computed=0, chunk=8)

        assert cache.set(1, embedding(rig, 1, larges))
        left = rig.pools.cache.evictable_size()
        assert left > 0
        # The next chunk takes its KV from cached prefixes.
        groups = rig.pools.allocator.groups
        assert rig.pools.allocator.pressure.make_room(groups.need(2))
        assert rig.pools.cache.evictable_size() < left
        assert cache.has(1)

        step_through(cache, image, computed=8, chunk=12)  # all of it is computed
        left = rig.pools.cache.evictable_size()
        rig.pools.allocator.pressure.make_room(groups.need(6))
        assert rig.pools.cache.evictable_size() == left, "now the image is what goes"
        rig.check_nothing_lost()


def test_of_the_images_of_a_step_those_with_rows_left_are_wanted():
    with seeing(DENSE) as (rig, cache):
        images = [Image(1, 2, 4), Image(2, 8, 8), Image(3, 1, 3), Image(4, 20, 4)]
        # Two prompts: of the first tokens 0 to 11 are computed by then, of the second all.
        cache.note_chunk(images, [0, 2, 3], [6, 0], [6, 10])
        guests = cache._guests
        assert guests.wanted == {2, cache.combine_hashes([1, 2])}
        # Of another modality: what is wanted of the first stays so.
        cache.note_chunk(images[3:], [0, 1], [6], [6])
        assert guests.wanted == {2, 4, cache.combine_hashes([1, 2]), cache.combine_hashes([4])}
        cache.note_chunk(images[:2], [0, 2], [12], [4])
        assert guests.wanted == {4, cache.combine_hashes([4])}
        # Its prompt has been aborted.
        rig.turn()
        assert guests.wanted == frozenset()


def test_the_image_of_a_prompt_in_flight_stays_wanted_between_its_chunks():
    with seeing(DENSE, Settings(chunk=4)) as (rig, cache):
        rid = rig.submit(answer([0], 12), 2)
        rig.turn()
        step_through(cache, Image(1, 0, 12), computed=0, chunk=4)
        rig.turn()
        assert rig.scheduler.chunked_req is not None
        assert 1 in cache._guests.wanted
        rig.abort(rid)
        rig.run()
        assert not cache._guests.wanted


def test_an_image_larger_than_what_can_be_had_is_not_kept_and_counted():
    with seeing(DENSE) as (rig, cache):
        prompt = answer([0], 14)
        rig.ask(prompt, 2)
        step_through(cache, Image(1, 0, 99), computed=0, chunk=8)

        assert not cache.set(1, embedding(rig, 1, 42))
        assert cache.get_single(1) is None
        assert cache.not_kept == 1
        assert rig.ask([*prompt, 1], 1).hit >= len(prompt), "nothing has been evicted in vain"
        step_through(cache, Image(1, 0, 99), computed=0, chunk=8)
        assert cache.set(1, embedding(rig, 1, 30)), "cached prefixes make room for what fits"


@BOTH
def test_a_flush_and_new_weights_drop_them(shape: Shape):
    with seeing(shape) as (rig, cache):
        for drop in (rig.flush, rig.exchange_weights):
            assert cache.set(1, embedding(rig, 1, 4))
            drop()
            rig.turn()
            assert cache.get_single(1) is None
            assert len(cache) == 0
        rig.check_nothing_lost()


def test_an_item_without_places_in_its_prompt_is_wanted_by_nobody():
    with seeing(DENSE) as (_, cache):
        nowhere = SimpleNamespace(hash=1, offsets=[])
        cache.note_chunk([nowhere, Image(2, 0, 9)], [0, 2], [0], [4])

        assert cache._guests.wanted == {2, cache.combine_hashes([1, 2])}


class Tower:
    """Makes rows of an image's own numbers, so many as it has tokens and ``more``; tells whose."""

    def __init__(self, more: int = 0) -> None:
        self.more = more
        self.asked: list[int] = []

    def __call__(self, items) -> torch.Tensor:
        self.asked += [item.hash for item in items]
        return torch.cat([rows(item.hash, tokens(item) + self.more) for item in items])


def rows(key: int, count: int) -> torch.Tensor:
    return (100 * key + torch.arange(count))[:, None].expand(count, 4).float()


def tokens(item) -> int:
    return sum(end - start + 1 for start, end in item.offsets)


def in_runs(key: int, *runs: tuple[int, int], modality: str = "IMAGE"):
    """An item of a prompt, as SGLang's processors make them."""
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    return MultimodalDataItem(modality=Modality[modality], hash=key, offsets=list(runs))


def look_up(tower: Tower, items, start: int, length: int, original=None):
    """The rows of a chunk, as SGLang asks for them where an item is several runs."""
    from sglang_jenga.serving.image_runs import embedding_of_chunk

    runs = [run for item in items for run in item.offsets]
    device = torch.device("cpu")
    return embedding_of_chunk(original, tower, items, runs, start, length, torch.zeros(1), device)


def test_images_of_several_runs_are_encoded_one_by_one_and_once():
    with seeing(DENSE) as (_, cache):
        tower, first, second = Tower(), in_runs(1, (1, 2), (4, 5)), in_runs(2, (7, 8), (10, 11))
        for start, length, wanted, asked in (
            (0, 3, rows(1, 2), [1]),
            (3, 5, torch.cat([rows(1, 4)[2:], rows(2, 4)[:1]]), [1, 2]),
            (8, 4, rows(2, 4)[1:], [1, 2]),
        ):
            found, _ = look_up(tower, [first, second], start, length)
            assert torch.equal(found, wanted)
            assert tower.asked == asked
        # Behind others in the next prompt, and a new one behind it.
        others = [in_runs(2, (0, 1), (3, 4)), in_runs(3, (6, 7), (9, 10))]
        found, _ = look_up(tower, others, 0, 11)
        assert torch.equal(found, torch.cat([rows(2, 4), rows(3, 4)]))
        assert tower.asked == [1, 2, 3]
        assert len(cache) == 3


@pytest.mark.parametrize("case", ["rows that nobody counted", "a video", "no cache"])
def test_what_cannot_be_looked_up_one_by_one_is_left_to_sglang(case: str):
    from sglang.srt.managers import mm_schedule

    with seeing(DENSE) as (_, cache):
        odd = case == "rows that nobody counted"
        tower = Tower(more=int(odd))
        modality = "VIDEO" if case == "a video" else "IMAGE"
        items = [in_runs(1, (1, 2), (4, 5), modality=modality)]
        if case == "no cache":
            mm_schedule.embedding_cache = None
        asked = []
        for _ in range(2):
            found = look_up(tower, items, 0, 6, lambda *given: asked.append(given) or "stock's")
            assert found == "stock's"
        assert [given[1:4] for given in asked] == [(items, [(1, 2), (4, 5)], 0)] * 2
        assert tower.asked == [1] * odd, "an odd tower is tried once"
        assert len(cache) == 0


def load(rig: Rig, seed: int, between) -> list[object]:
    """A random load with aborts and retractions, ``between`` its turns; how all of it ended."""
    draw = random.Random(seed)
    rids = []
    for _ in range(60):
        for _ in range(draw.randrange(3)):
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 16))]
            rids.append(rig.submit(prompt, draw.randrange(1, 12)))
        if rids and draw.random() < 0.1:
            rig.abort(draw.choice(rids))
        if draw.random() < 0.1:
            rig.retract()
        between(draw.random())
        rig.turn()
    rig.run()
    return [(rig.scheduler.model.forwards, [rig.ended(rid) for rid in rids])]


@pytest.mark.parametrize("model", ["dense", "windows", "states"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_requests_fare_as_without_images(model: str, page_size: int):
    """Who is admitted, hit, retracted and answered, and in how many steps."""
    shape, settings = MODELS[model][page_size], Settings(page_size=page_size, chunk=16)
    for seed in range(2):
        with Rig(shape, settings) as rig:
            alone = load(rig, seed, lambda _: None)
        kept, made = [], {}
        with seeing(shape, settings) as (rig, cache):

            def look(number: float, rig=rig, cache=cache, made=made, kept=kept) -> None:
                key, larges = int(number * 5), 1 + int(number * 1000) % 4
                found = cache.get_single(key)
                if found is None:
                    made[key] = embedding(rig, int(number * 1e6), larges)
                    cache.set(key, made[key])
                else:
                    kept.append(key)
                    assert torch.equal(found.embedding, made[key].embedding)

            assert load(rig, seed, look) == alone
            assert kept, "no image was ever found again"
            rig.check_nothing_lost()
