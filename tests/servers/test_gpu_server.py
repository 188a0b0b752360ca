"""Real servers on a GPU: bfloat16, CUDA graphs, overlapped steps, greedy answers as of stock.

Stock and jenga start side by side on one card, each with a small pool. Kernels that add in another
order for another batch may turn a near-tie of two tokens, in stock as well; so prompts come one at
a time here, which gives both servers the same batches.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from sglang_jenga.testing.gpu_backends import missing
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import write_tiny_model
from tests.servers.parity import first_wave

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not importlib.util.find_spec("sglang"), reason="needs SGLang"),
]

WINDOW = 32
NEW_TOKENS = 24
# Heads as wide as FlashInfer and the Triton kernels for linear attention take them.
MODELS = {
    "llama": {"head_dim": 64},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "num_layers": 6},
    "qwen3_next": {"head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "lfm2": {"head_dim": 64},
}
FLAGS = (
    *("--dtype", "bfloat16", "--max-total-tokens", "16384", "--max-running-requests", "8"),
    *("--mem-fraction-static", "0.6", "--cuda-graph-max-bs-decode", "8", "--random-seed", "1"),
    # Graphs of prefills take minutes to compile, and read the pool as prefills without do.
    *("--disable-prefill-cuda-graph", "--decode-log-interval", "1", "--skip-server-warmup"),
)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    return write_tiny_model(
        request.param, folder, window=WINDOW, dtype="bfloat16", **MODELS[request.param]
    )


@pytest.fixture(scope="module", params=["triton", "fa3", "flashinfer"])
def servers(request, model):
    """Stock and jenga on the same flags, booted at the same time."""
    if why := missing(request.param):
        pytest.skip(why)
    if (model.name, request.param) == ("lfm2", "triton"):
        pytest.skip("SGLang refuses Triton for LFM2")
    flags = (*FLAGS, "--attention-backend", request.param)
    both = [
        Server(model, *flags, *extra, gpu=True, boot_seconds=300)
        for extra in ((), ("--memory-backend", "jenga"))
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        booted = list(threads.map(stack.enter_context, both))
        yield booted


def answers(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    got = server.generate(prompts, NEW_TOKENS, concurrency=1)
    return [answer.output_ids for answer in got]


def test_greedy_answers_are_those_of_stock(servers):
    stock, jenga = servers
    prompts = first_wave()

    expected = answers(stock, prompts)

    assert answers(jenga, prompts) == expected
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2


def test_cached_prefixes_give_the_answers_of_stock(servers):
    """Each prompt goes on from an answer: what is hit is what decoding wrote."""
    stock, jenga = servers
    first = first_wave(seed=11)[:12]
    follow_ups = [
        prompt + tokens + [7, 8, 9]
        for prompt, tokens in zip(first, answers(stock, first), strict=True)
    ]
    assert answers(jenga, first) == [
        prompt[len(old) : -3] for old, prompt in zip(first, follow_ups, strict=True)
    ]

    got = jenga.generate(follow_ups, NEW_TOKENS, concurrency=1)

    assert [answer.output_ids for answer in got] == answers(stock, follow_ups)
    assert sum(answer.cached_tokens for answer in got) > 0


def test_many_at_a_time_all_finish_and_leak_nothing(servers):
    """Batches differ from run to run here, so this looks at lengths and at the pool."""
    _, jenga = servers

    got = jenga.generate(first_wave(seed=3), NEW_TOKENS)
    jenga.flush_cache()

    assert {len(answer.output_ids) for answer in got} == {NEW_TOKENS}
    assert jenga.alive()


def test_decoding_ran_in_cuda_graphs_on_the_jenga_pool(servers):
    _, jenga = servers
    jenga.generate([[5, 6, 7]], 8)

    log = jenga.log()

    assert "jenga plan" in log
    decodes = [line for line in log.splitlines() if "Decode batch" in line]
    assert decodes
    assert any("cuda graph: True" in line for line in decodes)
