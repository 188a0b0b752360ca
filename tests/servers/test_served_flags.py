"""Flags and variables that a jenga server honours like stock SGLang, in real engines."""

from __future__ import annotations

import json
import random
import re

import pytest

from sglang_jenga.testing.engines import EngineFailed, run_engine
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model, by family."""
    made: dict[str, object] = {}

    def path(family: str):
        if family not in made:
            layers = {"num_layers": 6} if family == "llama" else {}
            made[family] = write_tiny_model(family, tmp_path_factory.mktemp(family), **layers)
        return made[family]

    return path


def waves(count: int) -> list[list[list[int]]]:
    """Two waves of prompts; the second one goes on from parts of the first."""
    rng = random.Random(1)
    first = [[rng.randrange(3, VOCAB_SIZE) for _ in range(90)] for _ in range(count)]
    return [first, [prompt[:60] + [rng.randrange(3, VOCAB_SIZE)] * 9 for prompt in first]]


# ---- hidden states without a draft ----------------------------------------------------------


def print_hidden_states() -> None:
    """Let every request ask for hidden states, and the engine print them."""
    from sglang.srt.entrypoints.engine import Engine

    generate = Engine.generate

    def generate_with_states(self, **request):
        answers = generate(self, **request, return_hidden_states=True)
        for answer in answers:
            print("HIDDEN", json.dumps(answer["meta_info"]["hidden_states"]), flush=True)
        return answers

    Engine.generate = generate_with_states


def test_hidden_states_of_inner_layers_are_those_of_stock_sglang(model):
    found = []
    for backend in ("default", "jenga"):
        run = run_engine(
            model("llama"),
            waves(2),
            prepare=print_hidden_states,
            max_new_tokens=4,
            memory_backend=backend,
            # With the flag beside it, no draft: it names the layers to capture, three of them.
            speculative_algorithm="EAGLE3",
            enable_return_aux_hidden_states=True,
        )
        found.append([json.loads(line) for line in re.findall("^HIDDEN (.*)$", run.log, re.M)])
    stock, jenga = found
    assert len(stock) == 4
    prompt, *answer = stock[0]
    assert len(prompt) == 90
    assert len(answer) == 3
    assert jenga == stock


# ---- page invariants ------------------------------------------------------------------------

CHECKED = {
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    # SGLang asks for them after every step only at this level.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_MAMBA_CONV_DTYPE": "float32",  # as the tiny models
}
PRESSED = {"max_total_tokens": 500, "max_new_tokens": 24, "chunked_prefill_size": 64}


def count_checks() -> None:
    from sglang_jenga.serving.cache import JengaRadixCache

    check = JengaRadixCache.sanity_check

    def counted(self):
        check(self)
        print("CHECKED", flush=True)

    JengaRadixCache.sanity_check = counted


def double_a_page() -> None:
    """The trees hold one page twice and another one not at all: no count of theirs is wrong."""
    from sglang_jenga.radix.tree import RadixTrees

    insert = RadixTrees.insert

    def doubling(self, *args, **kwargs):
        node, declined = insert(self, *args, **kwargs)
        ids = node.extents[0].ids
        ids[:1] = ids[-1:]
        return node, declined

    RadixTrees.insert = doubling


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_every_step_is_checked_for_lost_and_doubled_pages(model, family):
    run = run_engine(
        model(family),
        waves(6),
        env=CHECKED,
        prepare=count_checks,
        memory_backend="jenga",
        **PRESSED,
    )

    assert len(run.outputs[1]) == 6
    assert run.log.count("CHECKED") > 24


def test_no_step_is_checked_unasked(model):
    run = run_engine(model("llama"), waves(2), prepare=count_checks, memory_backend="jenga")

    assert "CHECKED" not in run.log


def test_doubled_page_ends_the_server_that_checks(model):
    with pytest.raises(EngineFailed, match=r"in check_page_invariants(?s:.*)AssertionError"):
        run_engine(
            model("llama"),
            waves(2),
            env=CHECKED,
            prepare=double_a_page,
            memory_backend="jenga",
            **PRESSED,
        )
