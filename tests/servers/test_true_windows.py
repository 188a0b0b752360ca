"""--jenga-true-windows: tokens of Transformers' own Mistral and Ministral, windows and all.

SGLang's code attends beyond the window, or sees one token more, so stock SGLang is no reference
here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.tiny_models import write_tiny_model
from tests.models.transformers_greedy import greedy
from tests.servers.parity import NEW_TOKENS, PRESSURE_TOKENS, WINDOW, first_wave

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", {}),
    "ministral_windows": ("ministral_windows", {}),
}


def prepare(name: str, folder: Path):
    """Model, prompts several windows long, and Transformers' answers."""
    family, config = MODELS[name]
    model = write_tiny_model(family, folder / name, num_layers=6, window=WINDOW, **config)
    prompts = [prompt for prompt in first_wave() if len(prompt) > 3 * WINDOW][:12]
    return model, prompts, greedy(model, prompts, NEW_TOKENS)


def serve(model: Path, prompts: list[list[int]], **arguments: Any) -> Run:
    arguments = {"memory_backend": "jenga", "jenga_true_windows": True, **arguments}
    return run_engine(
        model, [prompts, prompts], max_new_tokens=NEW_TOKENS, chunked_prefill_size=64, **arguments
    )


@pytest.mark.parametrize(
    ("name", "page_size", "tokens"),
    [
        ("mistral", 1, PRESSURE_TOKENS),
        ("mistral", 16, 16384),
        ("ministral", 1, PRESSURE_TOKENS),
        ("ministral_windows", 16, 16384),
    ],
)
def test_tokens_are_those_of_transformers(prepared, name: str, page_size: int, tokens: int):
    model, prompts, expected = prepared(name)
    assert len(prompts) == 12

    run = serve(model, prompts, page_size=page_size, max_total_tokens=tokens)

    assert run.outputs == [expected, expected]
    assert sum(run.cached[1]) > 0


@pytest.mark.parametrize("name", ["mistral", "ministral"])
def test_without_the_switch_they_are_those_of_stock_and_others(prepared, name: str):
    model, prompts, expected = prepared(name)

    stock = serve(model, prompts, memory_backend="default")
    plain = serve(model, prompts, jenga_true_windows=False)

    assert plain.outputs == stock.outputs
    assert sum(a != b for a, b in zip(plain.outputs[0], expected, strict=True)) > 4
    assert "--jenga-true-windows does nothing without --memory-backend jenga" in stock.log
