"""What a vision tower makes of an image is made once, and lies in the pool: served models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Pictured, Run, run_engine
from sglang_jenga.testing.tiny_vision import VISION_FAMILIES, picture, write_tiny_vision_model
from tests.servers.parity import differing

pytestmark = pytest.mark.slow

LONG = "a tale that is somewhat longer than any window of theirs. "
NUM_IMAGES = 3
STOCKS_CAP = 2 << 10
"""Bytes that stock SGLang's cache may grow to here: less than any of the images takes."""
CHECKS = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}


def count_images() -> None:
    """The log tells of each image that a tower is run on; and stock's cache is small."""
    from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache
    from sglang.srt.models.gemma3_mm import Gemma3ForConditionalGeneration
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    init = MultiModalStaticCache.__init__
    MultiModalStaticCache.__init__ = lambda self, size: init(self, min(size, STOCKS_CAP))
    for model in (Gemma3ForConditionalGeneration, Qwen2_5_VLForConditionalGeneration):
        tower = model.get_image_feature

        def counted(self, items, tower=tower):
            print(f"tower: {len(items)} images", flush=True)
            return tower(self, items)

        model.get_image_feature = counted


def count_and_flush() -> None:
    """The same, and whoever finds the server idle has it flushed first."""
    from sglang.srt.managers.scheduler import Scheduler

    count_images()
    handle = Scheduler.handle_generate_request

    def flushed(self, *args, **kwargs):
        if self.is_fully_idle():
            assert self.flush_cache()
        return handle(self, *args, **kwargs)

    Scheduler.handle_generate_request = flushed


def waves(family: str) -> list[list[Pictured]]:
    """Three images, each longer than a chunk, in two prompts; and behind other texts."""
    mark = VISION_FAMILIES[family].image
    red, blue, wide = picture(1), picture(2), picture(3, width=168)
    first = [
        Pictured(f"see {mark} and say what it is", [red]),
        Pictured(f"{LONG}{mark} and then {mark} again", [blue, wide]),
    ]
    again = [
        Pictured(f"{LONG}{mark}{mark}", [red, blue]),
        Pictured(f"now {mark}, what is it?", [wide]),
    ]
    return [first, again]


def serve(family: str, model: Path, prepare=count_images, **arguments) -> Run:
    asked = VISION_FAMILIES[family].arguments | {"chunked_prefill_size": 8} | arguments
    return run_engine(
        model, waves(family), skip_tokenizer_init=False, env=CHECKS, prepare=prepare, **asked
    )


def images_encoded(run: Run) -> int:
    return sum(map(int, re.findall(r"tower: (\d+) images", run.log)))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_is_encoded_once_however_large_it_is(tmp_path: Path, family: str):
    model = write_tiny_vision_model(family, tmp_path / family, window=32)
    stock = serve(family, model, memory_backend="default")

    run = serve(family, model, memory_backend="jenga")

    assert differing(stock, run) == 0
    assert images_encoded(run) == NUM_IMAGES
    assert images_encoded(stock) > 2 * NUM_IMAGES, "stock encodes for each chunk"
    assert "Reserving" not in run.log, "memory is set aside for a cache that is not there"
    assert "Reserving" in stock.log


def test_after_a_flush_images_are_encoded_again_and_pages_are_all_there(tmp_path: Path):
    model = write_tiny_vision_model("qwen2_5_vl", tmp_path, window=32)

    run = serve("qwen2_5_vl", model, count_and_flush, memory_backend="jenga")

    assert images_encoded(run) == 2 * NUM_IMAGES
    empty = re.findall(r"jenga flush: (\d+) of (\d+) large pages empty", run.log)
    assert len(empty) == 2
    assert all(found == all_of_them for found, all_of_them in empty)
