"""One ordinary server, started as a user starts it: its own process, spawned children, HTTP."""

from __future__ import annotations

import json
import re
import time

import pytest

from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.testing.engines import run_engine
from sglang_jenga.testing.servers import Server, ServerFailed
from sglang_jenga.testing.tiny_models import write_tiny_model
from tests.servers.parity import first_wave

pytestmark = pytest.mark.slow
POOL_TOKENS = 700


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gemma3_text"
    return write_tiny_model("gemma3_text", folder, num_layers=6, window=32)


@pytest.fixture(scope="module")
def server(model):
    flags = ("--memory-backend", "jenga", "--max-total-tokens", str(POOL_TOKENS))
    with Server(model, *flags, "--enable-metrics", "--page-size", "16") as running:
        yield running


def test_the_answers_are_those_of_a_stock_engine(server, model):
    prompts = first_wave()
    expected = run_engine(model, [prompts], max_new_tokens=8)

    answers = server.generate(prompts, 8)

    assert [answer.output_ids for answer in answers] == expected.outputs[0]


def test_server_info_names_the_backend(server):
    assert server.server_info()["memory_backend"] == "jenga"


def test_a_repeated_prompt_is_cached(server):
    prompt = first_wave(seed=7)[10]
    server.generate([prompt], 4)

    answer = server.generate([prompt], 4)[0]

    assert answer.cached_tokens == (len(prompt) - 1) // 16 * 16


def test_usage_metrics_stay_fractions_of_a_pool_whose_split_moves(server):
    server.generate(first_wave(seed=3), 8)

    usage = {key: value for key, value in server.metrics().items() if "token_usage" in key}

    assert usage
    assert all(0 <= value <= 1 for value in usage.values()), usage


def test_load_and_metrics_tell_how_much_of_the_one_pool_is_in_use(server):
    """What is cached is told apart. Metrics are of the last batch: SGLang's, up to 30 s at idle."""
    server.generate(first_wave(seed=4), 8)

    metrics = server.metrics()
    pages = {
        state: next(
            value
            for name, value in metrics.items()
            if name.startswith("sglang:jenga_large_pages") and f'state="{state}"' in name
        )
        for state in ("empty", "cached", "used")
    }
    (load,) = server.loads()["loads"]

    (usage,) = (value for name, value in metrics.items() if name.startswith("sglang:token_usage"))
    assert pages["cached"] > 0
    assert usage == round(pages["used"] / sum(pages.values()), 2)
    num_large = int(re.search(r"jenga plan .*num_large=(\d+)", server.log()).group(1))
    assert 0 <= num_large - sum(pages.values()) <= 2, "but for null pages"
    assert load["token_usage"] == 0
    assert "pool usage: 0." in server.log()


def test_flush_returns_every_large_page(server):
    server.generate(first_wave(seed=5)[:6], 4)

    server.flush_cache()

    time.sleep(0.5)
    empty, total = re.findall(r"jenga flush: (\d+) of (\d+) large pages empty", server.log())[-1]
    assert int(empty) == int(total) > 0


def test_the_log_tells_the_plan_and_the_bytes_that_stock_would_take(server):
    """12 entries of a stock token: 6 layers x (K and V) x head dim x heads, float32."""
    pool_bytes = int(re.search(r"jenga plan pool_bytes=(\d+)", server.log()).group(1))
    layers, heads, head_dim = 6, 2, 16
    token_bytes = layers * 2 * heads * head_dim * 4
    stock_bytes = (POOL_TOKENS // 16 * 16 + 16) * token_bytes

    assert 0.98 * stock_bytes <= pool_bytes <= stock_bytes


def test_the_planner_plans_from_the_config_alone_what_the_server_builds(server, model):
    built = re.search(
        r"jenga plan pool_bytes=(\d+) large_page_bytes=(\d+) num_large=(\d+)", server.log()
    )
    pool_bytes, large_page_bytes, num_large = map(int, built.groups())
    config = json.loads((model / "config.json").read_text())

    plan = plan_pool(read_geometry(config, page_size=16, dtype="float32").groups, pool_bytes)

    assert (plan.large_page_bytes, plan.num_large) == (large_page_bytes, num_large)


def test_a_pool_too_small_for_one_request_is_refused_in_one_line(model):
    flags = ("--memory-backend", "jenga", "--page-size", "64", "--max-total-tokens", "64")
    with pytest.raises(ServerFailed) as failure, Server(model, *flags):
        pass

    text = str(failure.value)
    assert re.search(r"the server exited with (?!0)", text)
    line = next(line for line in text.splitlines() if "jenga:" in line and "large pages" in line)
    assert "one request of 81 tokens needs" in line  # 16, a page, and one to spare
    assert "--max-total-tokens" in line
    assert "Traceback" not in text
