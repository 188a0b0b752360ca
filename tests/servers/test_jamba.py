"""What is Jamba's own: SGLang has no code for it, so stock's pools are served by ours as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import EngineFailed, run_engine
from tests.servers.parity import differing, model_of
from tests.servers.stock_states import serve

pytestmark = pytest.mark.slow

TRACKED: dict[str, Any] = {
    "mamba_radix_cache_strategy": "extra_buffer",
    "disable_overlap_schedule": False,
    "chunked_prefill_size": 160,
    "page_size": 16,
}


def prepare(family: str, folder: Path):
    """Model and stock's answers without a prefix cache."""
    model = model_of(family, folder)
    return model, serve(model, disable_radix_cache=True)


def states_are_left_one_token_early() -> None:
    from sglang_jenga.models import jamba_mixer

    scan = jamba_mixer.selective_scan

    def early(*arguments: Any) -> None:
        *others, ends, slots = arguments
        scan(*others, ends - 1, slots) if len(arguments) == 14 else scan(*arguments)

    jamba_mixer.selective_scan = early


@pytest.mark.parametrize("backend", ["default", "jenga"])
def test_states_tracked_inside_prompts_give_the_same_tokens(prepared, backend: str):
    model, expected = prepared("jamba")

    run = serve(model, memory_backend=backend, **TRACKED)

    assert differing(expected, run) == 0
    assert sum(map(sum, run.cached)) > 1000


def test_a_state_tracked_at_the_wrong_token_shows_in_the_answers(prepared):
    model, expected = prepared("jamba")

    run = serve(model, prepare=states_are_left_one_token_early, **TRACKED)

    hits = sum(hit > 0 for wave in run.cached for hit in wave)
    assert hits > 10
    assert differing(expected, run) > hits // 4


def test_a_weight_without_a_place_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of("jamba", tmp_path)
    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.0.mamba.of_another_model"] = weights["lm_head.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(EngineFailed, match=r"holds model\.layers\.0\.mamba\.of_another_model"):
        run_engine(model, [[[5, 6, 7]]], max_new_tokens=1)
