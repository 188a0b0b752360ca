"""Llama 3.2 Vision: cross attention beside self-attention in one pool, against stock SGLang.

The reference is stock's answer to each prompt alone: who is batched with whom changes stock's
answers (`sglang_jenga.serving.text_rows`).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import Pictured, Run, run_engine
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.tiny_mllama import IMAGE, IMAGE_TOKENS, picture, prompt, write_tiny_mllama

pytestmark = pytest.mark.slow

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
}
PICTURES = [picture(0), picture(1), picture(2, 2, 1), picture(3, 4, 1), picture(4, 2, 2)]
QUESTIONS = ["what is this?", "what is that, and why?", "how many are there", "and the colour"]
PROMPTS = [
    prompt("no picture at all, only a text of some length"),
    *(prompt(text, shown) for text, shown in itertools.product(QUESTIONS[:2], PICTURES)),
    prompt("nor here"),
    prompt(QUESTIONS[2], PICTURES[0], PICTURES[1]),
    prompt(QUESTIONS[3], PICTURES[0], PICTURES[1]),
    prompt(QUESTIONS[2], PICTURES[3], PICTURES[0], PICTURES[1]),
    prompt("a third text without one, which is as long as any of the others, or a bit longer"),
    *(prompt(text, PICTURES[0]) for text in QUESTIONS[2:]),
    prompt("no picture at all, only a text of another length"),
]
NEW_TOKENS = 10


def serve(model: Path, waves: list[Any], **arguments: Any) -> Run:
    settings = {
        "skip_tokenizer_init": False,
        "max_total_tokens": 4096,
        "max_new_tokens": NEW_TOKENS,
    }
    return run_engine(model, waves, **(settings | {"env": STRICT} | arguments))


def prepare(family: str, folder: Path) -> tuple[Path, list[list[int]]]:
    """Model and stock's answers to each prompt alone."""
    model = write_tiny_mllama(folder / family)
    alone = serve(model, [[one] for one in PROMPTS], disable_radix_cache=True)
    return model, [answers[0] for answers in alone.outputs]


def test_each_prompt_alone_gets_stocks_tokens_and_hits_images_as_a_whole(prepared):
    model, expected = prepared("mllama")

    run = serve(model, [[one] for one in PROMPTS], memory_backend="jenga")

    assert [answers[0] for answers in run.outputs] == expected
    for asked, (cached,) in zip(PROMPTS, run.cached, strict=True):
        assert cached % IMAGE_TOKENS == 0 or cached >= len(asked.images) * IMAGE_TOKENS
    asked_before = [cached for (cached,) in run.cached[6:11]]
    assert min(asked_before) >= IMAGE_TOKENS  # the same pictures, another question
    assert run.cached[12] == [IMAGE_TOKENS]  # two pictures, of which the first has been shown


def fill_new_tensors_with_nan() -> None:
    """What memory that nobody has written may read as: SGLang's CPU attention counts on luck."""
    import torch

    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty = filled


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_all_at_once_get_the_tokens_that_they_get_alone(prepared, radix: bool, overlap: bool):
    model, expected = prepared("mllama")

    run = serve(
        model,
        [PROMPTS, PROMPTS[::-1]],
        memory_backend="jenga",
        disable_radix_cache=not radix,
        disable_overlap_schedule=not overlap,
        prepare=fill_new_tensors_with_nan,
    )

    assert run.outputs == [expected, expected[::-1]]
    assert (sum(run.cached[1]) > 500) == radix


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
def test_a_pool_for_three_requests_evicts_and_retracts_and_loses_nothing(prepared, radix: bool):
    model, expected = prepared("mllama")

    run = serve(
        model,
        [PROMPTS, PROMPTS[::-1], PROMPTS],
        memory_backend="jenga",
        disable_radix_cache=not radix,
        max_total_tokens=260,
        prepare=admit_too_many,
    )

    assert run.outputs == [expected, expected[::-1], expected]
    # Without a cache SGLang forecasts how answers of known lengths end, and admits nobody too many.
    assert (run.retractions > 0) == radix


def chat(turns: int) -> list[Pictured]:
    """What a client sends in each turn: all before; every second question has a new picture."""
    sent, said, shown = [], "", []
    for turn in range(turns):
        if turn % 2 == 0:
            shown.append(PICTURES[turn // 2])
            said += IMAGE
        said += f" {QUESTIONS[turn % len(QUESTIONS)]} I ask as number {turn}."
        sent.append(Pictured(said, tuple(shown)))
        said += f" That is {turn * turn}, as far as one can see."
    return sent


ENCODED = "test: images encoded:"


def tell_of_encoded_images() -> None:
    from sglang.srt.models.mllama import MllamaVisionModel

    forward = MllamaVisionModel.forward

    def told(self: Any, pixels: Any, *others: Any) -> Any:
        print(ENCODED, pixels.shape[0] * pixels.shape[1], flush=True)
        return forward(self, pixels, *others)

    MllamaVisionModel.forward = told


def test_a_chats_new_picture_is_the_only_one_that_is_encoded(prepared):
    model, _ = prepared("mllama")
    turns = [[turn] for turn in chat(6)]

    runs = {
        backend: serve(model, turns, memory_backend=backend, prepare=tell_of_encoded_images)
        for backend in ("default", "jenga")
    }
    stock, ours = runs.values()

    assert ours.outputs == stock.outputs
    encoded = {
        backend: [int(found) for found in re.findall(rf"{ENCODED} (\d+)", run.log)]
        for backend, run in runs.items()
    }
    assert encoded == {"default": [1, 2, 3], "jenga": [1, 1, 1]}
    behind_new = [cached for (cached,) in ours.cached[::2]]
    assert behind_new == [0, IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    assert [cached for (cached,) in stock.cached[::2]] == [0, 0, 0]
    assert ours.cached[1::2] == stock.cached[1::2]


def test_requests_that_lack_one_image_or_all_or_none_are_computed_in_one_step(prepared):
    """Chats of one, two and three pictures, some after their first turns, all at once."""
    model, _ = prepared("mllama")
    turns = chat(6)
    others = [prompt(text, PICTURES[1], PICTURES[0], PICTURES[0]) for text in QUESTIONS]
    wave = [*turns, PROMPTS[0], *others, *turns[::-1]]
    alone = serve(model, [[one] for one in wave], disable_radix_cache=True)
    expected = [answers[0] for answers in alone.outputs]

    run = serve(
        model,
        [turns[:1], [others[0]], wave, wave],
        memory_backend="jenga",
        prepare=fill_new_tensors_with_nan,
    )

    assert run.outputs[2:] == [expected, expected]
    assert {IMAGE_TOKENS, 2 * IMAGE_TOKENS} & set(run.cached[2])


def count_rows_as_sglang_does() -> None:
    from sglang_jenga.serving import text_rows

    text_rows.mask = lambda original, self, forward_batch: original(self, forward_batch)


def test_stocks_fault_with_text_behind_an_image_shows_where_it_is_not_mended(prepared):
    model, expected = prepared("mllama")

    run = serve(model, [PROMPTS], memory_backend="jenga", prepare=count_rows_as_sglang_does)

    wrong = [at for at, answer in enumerate(run.outputs[0]) if answer != expected[at]]
    assert wrong and all(not PROMPTS[at].images for at in wrong)
