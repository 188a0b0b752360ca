"""Models that stock SGLang serves on its CPU engine only with our reference operators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_jenga.testing.tiny_models import STATE_FAMILIES
from tests.models import jet_reference
from tests.servers.faults import one_window_token_too_few
from tests.servers.parity import differing, first_wave, model_of
from tests.servers.stock_states import serve

pytestmark = pytest.mark.slow

FAMILIES = (
    "mamba",
    "falcon_mamba",
    "mamba2",
    "jamba",
    "nemotron_h",
    "qwen3_5",
    "qwen3_5_moe",
    "jet_nemotron",
)
WAYS = {
    "cached": {},
    "cached and chunked": {"chunked_prefill_size": 64},
    "overlap, chunked, page 16": {
        "disable_radix_cache": True,
        "disable_overlap_schedule": False,
        "chunked_prefill_size": 64,
        "page_size": 16,
    },
}


def prepare(family: str, folder: Path):
    """Model and stock's answers without a prefix cache."""
    model = model_of(family, folder)
    return model, serve(model, disable_radix_cache=True)


def of_transformers(model: Path, prompt: list[int], count: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        tokens = other.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_stock_answers_what_another_implementation_answers(prepared, family: str):
    """Of the whole model: transformers', and for Jet-Nemotron, which it lacks, one of ours."""
    model, served = prepared(family)
    answer = jet_reference.greedy if family == "jet_nemotron" else of_transformers
    prompts, answers = first_wave(), served.outputs[0]

    for index in (0, 9, 20):
        assert answer(model, prompts[index], len(answers[index])) == answers[index]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_stock_answers_the_same_however_it_cuts_and_caches(prepared, family: str, way: str):
    model, expected = prepared(family)

    run = serve(model, **WAYS[way])

    assert differing(expected, run) == 0
    hits = sum(map(sum, run.cached))
    assert hits > 1000 if way.startswith("cached") else hits == 0


def cached_states_are_not_copied() -> None:
    """A request that hits finds another's state in its slot, or none."""
    from sglang.srt.mem_cache.memory_pool import MambaPool

    MambaPool.copy_from = lambda *arguments: None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_state_shows_in_the_tokens(prepared, family: str):
    model, expected = prepared(family)

    run = serve(model, prepare=cached_states_are_not_copied)

    hits = sum(hit > 0 for wave in run.cached for hit in wave)
    assert hits > 10
    assert differing(expected, run) > hits // 2


def test_a_window_one_token_short_shows_in_the_tokens(prepared):
    """Of the mix of states, windows and full attention; stock keeps its windows as full KV."""
    model, expected = prepared("jet_nemotron")

    run = serve(model, disable_radix_cache=True, prepare=one_window_token_too_few)

    assert differing(expected, run) > sum(map(len, expected.outputs)) // 2
