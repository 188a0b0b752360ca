"""Replays of requests with images: what SGLang is told of them, and what its pools make of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from benchmarks.replay.baselines import BASELINES
from benchmarks.replay.clock import Clock
from benchmarks.replay.engine import ReplayFailed
from benchmarks.replay.geometries import GEOMETRIES
from benchmarks.replay.pictures import Pictures
from benchmarks.replay.recorder import Recorder, Span
from benchmarks.replay.requests import VOCABULARY, Request
from benchmarks.replay.result import Result
from benchmarks.replay.run import replay
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.plan.spec import LayerGroup

SIGHTED = GEOMETRIES["llama-3.2-11b-vision"]
IMAGE = SIGHTED.real.encoder
FULL, CROSS = (group.entry_bytes for group in SIGHTED.replayed)
LOAD = Pictures(images=4, question=(8, 16), answer=(8, 16))


def padded(image: int) -> list[int]:
    """A prompt as SGLang's scheduler has it, with the model's own padding."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.models.mllama import MllamaForConditionalGeneration

    from benchmarks.replay.messages import tokenized

    prompt = np.concatenate([np.full(IMAGE, VOCABULARY + image), [5, 6, 7]])
    sent = tokenized(Request("r", prompt, np.array([1]), 0.0, encoder=IMAGE), known_length=True)
    inputs = MultimodalInputs.from_processor_output(sent.mm_inputs)
    model = SimpleNamespace(vision_model=SimpleNamespace(num_patches=40 * 40 + 1))
    found = MllamaForConditionalGeneration.pad_input_ids(model, sent.input_ids, inputs)
    assert inputs.num_image_tokens == IMAGE
    return list(found)


def test_an_image_is_sent_beside_its_text_and_padded_to_as_many_tokens_as_the_prompt_has():
    one = padded(1)

    assert len(one) == IMAGE + 3 and one[IMAGE:] == [5, 6, 7]
    assert len(set(one[:IMAGE])) == 1
    assert padded(1) == one
    assert padded(2)[:IMAGE] != one[:IMAGE]


def test_a_model_that_sees_no_images_is_not_asked_about_them():
    with pytest.raises(ValueError, match=r"mmmu: llama-3\.1-8b sees no images"):
        replay(
            GEOMETRIES["llama-3.1-8b"],
            LOAD.build(),
            BASELINES["stock"],
            pool_bytes=1 << 34,
            clock=Clock(),
        )


def test_full_layers_need_the_text_of_rows_and_cross_layers_their_images_a_shared_one_once():
    groups = (LayerGroup(Full(), (0,), 100), LayerGroup(Cross(), (1,), 10))
    # Images of three tokens at slots 1 to 3, before texts of two and three tokens; a text of two.
    rows = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 8], [9, 1, 0, 0, 0, 0]])
    scheduler = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=rows))
    spans = [Span(0, 0, 5, 3), Span(1, 5, 6, 3), Span(2, 0, 2, 0)]

    needed = Recorder(groups, 10_000)._needed(scheduler, spans)

    assert needed == [(2 + 3 + 2) * 100, 3 * 10]


def play(baseline: str) -> Result:
    """In a pool where stock has room for two and a half images."""
    pool_bytes = int(2.5 * IMAGE * (FULL + CROSS)) * SIGHTED.scale
    load = LOAD.build()
    return replay(
        SIGHTED, load, BASELINES[baseline], pool_bytes=pool_bytes, clock=Clock(), seconds=300
    )


@pytest.mark.slow
def test_stock_stores_images_in_every_layer_and_jenga_in_those_that_read_them():
    stock, jenga = play("stock"), play("jenga")

    text = sum(r.prompt.size - IMAGE + r.output.size for r in LOAD.build().requests)
    for found in (stock, jenga):
        # Questions share their image, and no text.
        assert {served.hit_tokens for served in found.requests} == {0, IMAGE}
    assert max(stock.steps.held["full"]) > 2 * IMAGE * FULL
    assert max(jenga.steps.held["full"]) <= text * FULL
    assert max(jenga.steps.held["cross"]) >= 4 * IMAGE * CROSS
    assert jenga.totals["wasted_share"] < 0.01 < 0.5 < stock.totals["wasted_share"]
    assert jenga.totals["peak_running"] == len(LOAD.build().requests)
    assert stock.totals["peak_running"] < jenga.totals["peak_running"]


@pytest.mark.slow
def test_an_image_of_another_length_than_the_request_came_with_stops_the_replay(monkeypatch):
    from benchmarks.replay import messages

    monkeypatch.setattr(messages, "TILES", 3)

    with pytest.raises(ReplayFailed, match="came with an image of 6404 tokens and has 4803"):
        play("stock")
