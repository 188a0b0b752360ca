"""A pipeline of two stages against stock SGLang on one rank: the same tokens when memory is short.

Each stage schedules by itself. Before memory is short nothing can differ between them; afterwards a
page more or less in one stage is another batch, and hidden states of the wrong shape for the next.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import EngineFailed, Run, run_engine
from sglang_jenga.testing.families import FAMILY_ARGUMENTS, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many, recount_every_round
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE, write_tiny_model
from tests.servers.parity import TOKENS_PER_STATE, WINDOW, first_wave, model_of, next_wave
from tests.servers.ranks import COMPARED, one_large_page_fewer, same, traces

pytestmark = pytest.mark.slow
# Of full attention, of windows beside it, and of states. Llama's stages have two layers and three,
# and Qwen3.5's first has no full attention. Of Gemma-4 and Nemotron-H SGLang builds pools for all
# layers in each stage, since they do not tell it which ones a stage has.
TOKENS = {"llama": 640, "gemma4": 300, "qwen3_5": 640, "nemotron_h": 640}


def of_uneven_stages(family: str, folder: Path) -> Path:
    if family in STATE_FAMILIES:
        return model_of(family, folder)
    return write_tiny_model(family, folder / family, num_layers=5, window=WINDOW)


def chats(family: str, folder: Path, **arguments: Any) -> Run:
    """Two waves of 24 answer tokens, the second from the first."""
    first = first_wave()
    return run_engine(
        of_uneven_stages(family, folder),
        [first, lambda answers: next_wave(first, answers[0], seed=1)],
        max_new_tokens=24,
        env=COMPARED,
        **(FAMILY_ARGUMENTS.get(family, {}) | arguments),
    )


def pressed() -> None:
    admit_too_many()
    recount_every_round()


def plans(run: Run) -> list[str]:
    return re.findall(r"jenga plan (pool_bytes=.*)", run.log)


@pytest.mark.parametrize("family", TOKENS)
def test_two_stages_answer_as_one_rank_does_when_memory_is_short(tmp_path, family: str):
    stock = chats(family, tmp_path, max_total_tokens=16384, **FULL_KV.get(family, {}))
    states: dict[str, Any] = {}
    if family in STATE_FAMILIES:
        states = FULL_KV[family] | {"max_mamba_cache_size": TOKENS[family] // TOKENS_PER_STATE}

    run = chats(
        family,
        tmp_path,
        memory_backend="jenga",
        pp_size=2,
        max_total_tokens=TOKENS[family],
        chunked_prefill_size=64,
        prepare=pressed,
        **states,
    )

    assert run.outputs == stock.outputs
    assert run.retractions > 0
    assert run.hit_tokens > 0
    assert len(plans(run)) == 2
    assert len(set(plans(run))) == 1
    assert same(*(traces(run.log, stage, named="PP") for stage in (0, 1)))


def test_a_pool_that_holds_little_more_than_one_request_answers_everybody(tmp_path):
    """Two micro-batches have a request each. Stock aborts the one that does not fit."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(6)]

    def answered(**arguments: Any) -> Run:
        model = model_of("llama", tmp_path)
        return run_engine(model, [prompts], max_new_tokens=100, env=COMPARED, **arguments)

    stock = answered(max_total_tokens=4096)

    run = answered(memory_backend="jenga", pp_size=2, max_total_tokens=160, prepare=pressed)

    assert run.outputs == stock.outputs
    assert run.retractions > 0


def test_stages_of_several_ranks_answer_as_these_do_without_stages(tmp_path):
    stock = chats("llama", tmp_path, max_total_tokens=16384, tp_size=2)

    run = chats(
        "llama",
        tmp_path,
        memory_backend="jenga",
        pp_size=2,
        tp_size=2,
        max_total_tokens=640,
        chunked_prefill_size=64,
        prepare=pressed,
    )

    assert run.outputs == stock.outputs
    assert run.retractions > 0
    assert len(plans(run)) == 4
    assert same(
        *(traces(run.log, rank, named=f"PP{stage} TP") for stage in (0, 1) for rank in (0, 1))
    )


def test_a_stage_with_another_plan_ends_the_server(tmp_path):
    with pytest.raises(
        EngineFailed, match=r"differ in number of large pages \(\d+ on rank 0; \d+ on rank 1\)"
    ):
        chats(
            "llama",
            tmp_path,
            memory_backend="jenga",
            pp_size=2,
            max_total_tokens=640,
            prepare=one_large_page_fewer,
        )


def test_a_long_prompt_alone_runs_in_chunks(tmp_path):
    """The chunk before is in another micro-batch, and stands in the way of none."""
    prompt = [list(range(3, 203))]

    def answered(**arguments: Any) -> Run:
        model = of_uneven_stages("llama", tmp_path)
        return run_engine(model, [prompt, prompt], env=COMPARED, **arguments)

    stock = answered(max_total_tokens=4096)

    run = answered(
        memory_backend="jenga",
        pp_size=2,
        max_total_tokens=240,
        chunked_prefill_size=32,
        prepare=pressed,
    )

    assert run.outputs == stock.outputs
    assert run.retractions == 0
    assert run.cached == [[0], [199]]
