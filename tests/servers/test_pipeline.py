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

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FAMILY_ARGUMENTS, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE, write_tiny_model
from tests.servers.parity import WINDOW, first_wave, model_of, next_wave
from tests.servers.ranks import traces

pytestmark = pytest.mark.slow
CHECKED = EXACT | {
    "SGLANG_JENGA_COMPARE_RANKS": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}
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
        env=CHECKED,
        **(FAMILY_ARGUMENTS.get(family, {}) | arguments),
    )


def plans(run: Run) -> list[str]:
    return re.findall(r"jenga plan (pool_bytes=.*)", run.log)


@pytest.mark.parametrize("family", TOKENS)
def test_two_stages_answer_as_one_rank_does_when_memory_is_short(tmp_path, family: str):
    stock = chats(family, tmp_path, max_total_tokens=16384, **FULL_KV.get(family, {}))
    states: dict[str, Any] = {}
    if family in STATE_FAMILIES:
        states = FULL_KV[family] | {"max_mamba_cache_size": TOKENS[family] // 40}

    run = chats(
        family,
        tmp_path,
        memory_backend="jenga",
        pp_size=2,
        max_total_tokens=TOKENS[family],
        chunked_prefill_size=64,
        prepare=admit_too_many,
        **states,
    )

    assert run.outputs == stock.outputs
    assert run.retractions > 0
    assert run.hit_tokens > 0
    assert len(plans(run)) == 2
    assert len(set(plans(run))) == 1
    first, second = (traces(run, stage, named="PP") for stage in (0, 1))
    assert len(first) >= 1
    assert first[-1] == second[-1], "pages handed out and evicted by either stage"


def test_a_pool_that_holds_little_more_than_one_request_answers_everybody(tmp_path):
    """Two micro-batches have a request each. Stock aborts the one that does not fit."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(6)]

    def answered(**arguments: Any) -> Run:
        model = model_of("llama", tmp_path)
        return run_engine(model, [prompts], max_new_tokens=100, env=CHECKED, **arguments)

    stock = answered(max_total_tokens=4096)

    run = answered(memory_backend="jenga", pp_size=2, max_total_tokens=160, prepare=admit_too_many)

    assert run.outputs == stock.outputs
    assert run.retractions > 0


def test_stages_of_several_ranks_answer_as_one_rank_does(tmp_path):
    stock = chats("llama", tmp_path, max_total_tokens=16384)

    run = chats(
        "llama", tmp_path, memory_backend="jenga", pp_size=2, tp_size=2, max_total_tokens=640
    )

    assert run.outputs == stock.outputs
    assert len(set(plans(run))) == 1
