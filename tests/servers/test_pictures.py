"""Models that take images for tokens of the prompt: tokens of stock SGLang, from one pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import Pictured, Run, run_engine
from sglang_jenga.testing.pressure import admit_too_many, retract_every
from sglang_jenga.testing.tiny_vision import VISION_FAMILIES, picture, write_tiny_vision_model
from tests.servers.parity import differing

pytestmark = pytest.mark.slow

NEW_TOKENS = 24
WINDOW = 32
FEW_TOKENS = {"qwen2_5_vl": 400, "gemma3": 250}
"""Stock's bytes of so many tokens: a few of the prompts fit at once."""
LONG = "a tale that is somewhat longer than any window of theirs. "


class Prompts:
    """Two waves of texts with pictures in them, as a family writes them."""

    def __init__(self, family: str) -> None:
        mark = VISION_FAMILIES[family].image

        def text(*parts: Any) -> Pictured:
            words = [part if isinstance(part, str) else mark for part in parts]
            return Pictured("".join(words), [part for part in parts if not isinstance(part, str)])

        self.mark = mark
        red, blue, wide = picture(1), picture(2), picture(3, width=168)
        first = [
            text("see ", red, " and say what it is"),
            text("see ", blue, " and say what it is"),
            text("first ", red, " then ", wide, ": what has changed?"),
            text("no picture at all, but ", LONG),
            text(LONG, wide, " and ", red, LONG),
            text(LONG, blue, LONG),
            text(wide),
            text(LONG, "no picture either"),
        ]
        again = [
            text("see ", red, " and tell me: ", LONG),  # the picture is cached
            text("see ", blue, " and tell me: ", LONG),
            text("see ", wide, " and tell me: ", LONG),  # another one in its place
            text("first ", red, " then ", blue, ": what has changed?"),
            text(LONG, wide, " and ", red, " once more"),
            text("now see ", red, " and say what it is"),  # the same one behind other text
        ]
        self.waves = [first, again]


def prepare(family: str, folder: Path):
    """Model, prompts and stock SGLang's answers, with prompts computed whole."""
    model = write_tiny_vision_model(family, folder / family, window=WINDOW)
    prompts = Prompts(family)
    return model, prompts, serve(family, model, prompts, memory_backend="default")


def serve(family: str, model: Path, prompts: Prompts, **arguments: Any) -> Run:
    arguments = {
        "memory_backend": "jenga",
        "chunked_prefill_size": -1,
        "max_new_tokens": NEW_TOKENS,
        **VISION_FAMILIES[family].arguments,
        **arguments,
    }
    return run_engine(model, prompts.waves, skip_tokenizer_init=False, **arguments)


@pytest.mark.parametrize("family", FEW_TOKENS)
def test_prompts_cut_inside_their_pictures_give_the_tokens_of_stock(prepared, family: str):
    model, prompts, expected = prepared(family)
    red, blue = expected.outputs[0][:2]
    assert red != blue, "a picture makes no difference to this model"

    run = serve(family, model, prompts, chunked_prefill_size=16, page_size=1)

    assert differing(expected, run) == 0
    before = len("see ")
    assert [hit > before + 16 for hit in run.cached[1][:3]] == [True, True, False]


def press() -> None:
    """Requests run out of memory, and some are retracted where windows make that rare."""
    admit_too_many()
    retract_every(7)


@pytest.mark.parametrize("family", FEW_TOKENS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_full_pool_gives_the_tokens_of_stock(prepared, family: str, page_size: int):
    model, prompts, expected = prepared(family)

    run = serve(
        family,
        model,
        prompts,
        chunked_prefill_size=32,
        page_size=page_size,
        max_total_tokens=FEW_TOKENS[family],
        prepare=press,
    )

    assert differing(expected, run) == 0
    assert run.retractions > 0
