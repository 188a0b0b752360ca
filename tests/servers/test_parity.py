"""The part of the parity matrix that every run covers; `python -m tests.servers.parity` is all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import run_engine
from tests.servers.faults import one_window_token_too_few, one_wrong_page
from tests.servers.parity import (
    NEW_TOKENS,
    PRESSURE,
    WINDOW,
    Cell,
    differing,
    model_of,
    reference,
    run_cell,
)

pytestmark = pytest.mark.slow

# Every value of every option, every pair of page size with chunking, on the two main families.
COVER = (
    Cell(1, chunked=False, overlap=True, radix=True),
    Cell(16, chunked=True, overlap=False, radix=True),
    Cell(64, chunked=True, overlap=True, radix=False),
    PRESSURE[0],
    PRESSURE[2],
    PRESSURE[5],
)
# One paged, chunked cell with the cache on for the others.
ONCE = (Cell(16, chunked=True),)
MAIN = ("gemma3_text", "llama")
OTHERS = ("qwen2", "qwen3", "mistral", "gemma2", "olmo2", "olmo3", "cohere2", "gemma4", "ministral")


def prepare(family: str, folder: Path):
    """Model, prompts and stock SGLang's answers."""
    model = model_of(family, folder)
    return model, *reference(family, model)


CASES = [(family, cell) for family in MAIN for cell in COVER]
CASES += [(family, cell) for family in OTHERS for cell in ONCE]
# A prompt parked between chunks while a smaller one would fit (this once lost a token).
CASES += [("gemma2", PRESSURE[5])]
# Windows that only the table of models knows: what is given back too early shows under pressure.
CASES += [("ministral", PRESSURE[5])]
# Windows alone, page size 1 with the cache and 16 without, while pages are evicted.
CASES += [("ministral_windows", PRESSURE[0]), ("ministral_windows", PRESSURE[3])]


@pytest.mark.parametrize(
    ("family", "cell"), CASES, ids=[f"{family}: {cell.label}" for family, cell in CASES]
)
def test_tokens_are_those_of_stock_sglang(prepared, family: str, cell: Cell):
    model, waves, expected = prepared(family)
    assert sum(map(len, waves)) >= 64
    assert max(len(prompt) for wave in waves for prompt in wave) > 5 * WINDOW

    run = run_cell(family, model, waves, cell)

    assert differing(expected, run) == 0
    if cell.radix:
        assert sum(map(sum, run.cached)) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_pools_give_the_tokens_of_stock(prepared, dtype: str):
    model, waves, _ = prepared("gemma3_text")
    # Rounding depends on how prompts are cut and batched, so both sides do it alike.
    arguments = ONCE[0].arguments() | {"dtype": dtype}
    stock = run_engine(
        model,
        waves[:1],
        max_new_tokens=NEW_TOKENS,
        **(arguments | {"memory_backend": "default"}),
    )

    run = run_engine(model, waves[:1], max_new_tokens=NEW_TOKENS, **arguments)

    assert run.outputs == stock.outputs


def test_the_pressure_cells_retract_requests(prepared):
    model, waves, _ = prepared("llama")

    assert run_cell("llama", model, waves, PRESSURE[0]).retractions > 0


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_dense_model_holds_as_many_tokens_as_in_stock(prepared, page_size: int):
    model, waves, _ = prepared("llama")
    capacity = []
    for backend in ("default", "jenga"):
        run = run_engine(
            model,
            [waves[0][:1]],
            max_new_tokens=1,
            memory_backend=backend,
            page_size=page_size,
            max_total_tokens=1000,
        )
        capacity.append(int(re.search(r"max_total_num_tokens=(\d+)", run.log).group(1)))

    assert capacity[0] == capacity[1] == 1000 // page_size * page_size


@pytest.mark.parametrize("fault", [one_wrong_page, one_window_token_too_few])
def test_the_tiny_model_shows_a_memory_fault_in_its_tokens(prepared, fault):
    """Parity means something only if a fault of this size would break it."""
    model, waves, expected = prepared("gemma3_text")

    run = run_engine(
        model,
        waves[:1],
        max_new_tokens=NEW_TOKENS,
        prepare=fault,
        **PRESSURE[0]._replace(tokens=16384).arguments(),
    )

    changed = sum(a != b for a, b in zip(expected.outputs[0], run.outputs[0], strict=True))
    assert changed > len(waves[0]) // 4
