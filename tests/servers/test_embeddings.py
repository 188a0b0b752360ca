"""What a vision tower makes of an image or a video is made once, and lies in the pool: served
models."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Pictured, Run, run_engine
from sglang_jenga.testing.tiny_vision import VISION_FAMILIES, film, picture, write_tiny_vision_model
from tests.servers.parity import differing

pytestmark = pytest.mark.slow

LONG = "a tale that is somewhat longer than any window of theirs. "
STOCKS_CAP = 2 << 10
"""Bytes that stock SGLang's cache may grow to here: less than any of the images takes."""
NUM_IMAGES = 3
MODELS = (
    "gemma3_mm.Gemma3ForConditionalGeneration",
    "internvl.InternVLChatModel",
    "llava.LlavaForConditionalGeneration",
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl.Qwen3VLForConditionalGeneration",
)
"""SGLang's classes of the families."""
CHECKS = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}


def count_images() -> None:
    """The log tells of each image and video that a tower is run on; and stock's cache is small."""
    from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache

    init = MultiModalStaticCache.__init__
    MultiModalStaticCache.__init__ = lambda self, size: init(self, min(size, STOCKS_CAP))
    for name in MODELS:
        module, model = name.split(".")
        model = getattr(importlib.import_module(f"sglang.srt.models.{module}"), model)
        for kind in ("image", "video"):
            if tower := getattr(model, f"get_{kind}_feature", None):
                setattr(model, tower.__name__, _told(tower, kind))


def _told(tower, kind: str):
    # With its name: SGLang knows Qwen3-VL's towers by it.
    @functools.wraps(tower)
    def counted(self, items):
        print(f"tower: {len(items)} {kind}s", flush=True)
        return tower(self, items)

    return counted


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


def waves(family: str, model: Path) -> list[list[Pictured]]:
    """Three images, each longer than a chunk, in two prompts; and behind other texts. The same with
    a video of four times as many tokens, where the model takes one."""
    mark, video = VISION_FAMILIES[family].image, VISION_FAMILIES[family].video
    red, blue, wide = picture(1), picture(2), picture(3, width=168)
    # Two of one size in a prompt: a processor may pad the smaller, and then it is another image.
    first = [
        Pictured(f"see {mark} and say what it is", [wide]),
        Pictured(f"{LONG}{mark} and then {mark} again", [red, blue]),
    ]
    again = [
        Pictured(f"{LONG}{mark}{mark}", [blue, red]),
        Pictured(f"now {mark}, what is it?", [wide]),
    ]
    if video is not None:
        for wave, text in ((first, f"see {video} and say"), (again, f"{LONG}{video}: what?")):
            wave.append(Pictured(text, [], [film(4, text, model)]))
    return [first, again]


def serve(family: str, model: Path, prepare=count_images, **arguments) -> Run:
    asked = VISION_FAMILIES[family].arguments | {"chunked_prefill_size": 8} | arguments
    shown = waves(family, model)
    return run_engine(model, shown, skip_tokenizer_init=False, env=CHECKS, prepare=prepare, **asked)


def encoded(run: Run, kind: str) -> int:
    """Images, or videos, that a tower was run on."""
    return sum(map(int, re.findall(rf"tower: (\d+) {kind}s", run.log)))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_an_image_is_encoded_once_however_large_it_is(tmp_path: Path, family: str):
    model = write_tiny_vision_model(family, tmp_path / family, window=32)
    stock = serve(family, model, memory_backend="default")

    run = serve(family, model, memory_backend="jenga")

    assert differing(stock, run) == 0
    counts = {"image": NUM_IMAGES, "video": int(VISION_FAMILIES[family].video is not None)}
    for kind, count in counts.items():
        assert encoded(run, kind) == count
        assert encoded(stock, kind) > 2 * count or not count, "stock encodes for each chunk"
    assert "Reserving" not in run.log, "memory is set aside for a cache that is not there"
    assert "Reserving" in stock.log


def test_after_a_flush_images_are_encoded_again_and_pages_are_all_there(tmp_path: Path):
    model = write_tiny_vision_model("qwen2_5_vl", tmp_path, window=32)

    run = serve("qwen2_5_vl", model, count_and_flush, memory_backend="jenga")

    assert encoded(run, "image") == 2 * NUM_IMAGES
    assert encoded(run, "video") == 2
    empty = re.findall(r"jenga flush: (\d+) of (\d+) large pages empty", run.log)
    assert len(empty) == 2
    assert all(found == all_of_them for found, all_of_them in empty)
