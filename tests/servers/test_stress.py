"""A short run of the stress program; `python -m tests.servers.stress` plays 2,000 requests."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.tiny_mllama import write_tiny_mllama
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.warm import WarmLauncher, shared_warm_launcher
from tests.servers.stress import POOL_STATES, RETRACTING, jobs_of, pictured_jobs_of, stress


@pytest.fixture(scope="module")
def launchers():
    with WarmLauncher(env=RETRACTING) as retracting:
        yield shared_warm_launcher(), retracting


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["no_buffer", "extra_buffer"])
def test_states_survive_aborts_and_disconnects_on_a_small_pool(tmp_path, launchers, strategy: str):
    model = write_tiny_model("qwen3_next", tmp_path / "model")

    report = stress(
        model,
        jobs_of(150),
        "--mamba-radix-cache-strategy",
        strategy,
        states=POOL_STATES,
        launchers=launchers,
    )

    assert report.clean, report
    assert report.finished >= 100


@pytest.mark.slow
@pytest.mark.parametrize("page_size", ["1", "16"])
def test_aborts_and_disconnects_on_a_small_pool_lose_nothing(tmp_path, launchers, page_size: str):
    model = write_tiny_model("gemma3_text", tmp_path / "model", num_layers=6, window=32)

    report = stress(model, jobs_of(150), "--page-size", page_size, launchers=launchers)

    assert report.clean, report
    assert report.retractions > 0
    assert report.finished >= 100


@pytest.mark.slow
def test_pictures_survive_aborts_before_and_after_the_first_token_on_a_small_pool(
    tmp_path, launchers
):
    model = write_tiny_mllama(tmp_path / "model")

    report = stress(model, pictured_jobs_of(200), launchers=launchers)

    assert report.clean, report
    assert report.retractions > 0
    assert report.finished >= 120
