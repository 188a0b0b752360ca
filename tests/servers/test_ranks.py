"""Several ranks in processes of their own: tensor parallel, data parallel, DP attention.

Every rank has a scheduler and a pool. Those of a tensor parallel group must hand out the same pages
though nobody tells them to; `sglang_jenga.serving.rank_trace` shows whether they do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.cpu_engine import CPU_ENV, ROOT
from sglang_jenga.testing.engines import EngineFailed
from sglang_jenga.testing.families import STOCK_STATES
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.servers import CPU_FLAGS, Server, with_defaults
from sglang_jenga.testing.tiny_mllama import write_tiny_mllama
from sglang_jenga.testing.warm import shared_warm_launcher
from tests.servers.parity import model_of
from tests.servers.ranks import (
    COMPARED,
    FIRST,
    NEW_TOKENS,
    PRESSED,
    UNTAKEN,
    go_on,
    hits_refresh_nothing,
    one_large_page_fewer,
    padding_lies_in_a_page,
    same,
    serve,
    tell_of_untaken_pages,
    traces,
)
from tests.servers.test_mllama import PROMPTS as PICTURED

pytestmark = pytest.mark.slow


def prepare(family: str, folder: Path) -> Path:
    if family == "mllama":
        return write_tiny_mllama(folder / family)
    return model_of(family, folder)


def stock(family: str, model: Path) -> list[list[list[int]]]:
    """What stock's ranks answer, with memory to spare; to prompts with pictures one by one, since
    there stock's answer depends on who is batched with whom."""
    if family == "mllama":
        run = serve(
            model,
            waves=[[one] for one in PICTURED],
            tp_size=2,
            skip_tokenizer_init=False,
            chunked_prefill_size=-1,
            disable_radix_cache=True,
        )
        return 2 * [[answers[0] for answers in run.outputs]]
    states = STOCK_STATES if family == "qwen3_next" else {}
    return serve(model, tp_size=2, max_total_tokens=8192, **states).outputs


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "mllama"])
def test_two_ranks_do_under_pressure_what_one_does_and_answer_as_stocks_do(prepared, family: str):
    """Tokens are held against two of stock's ranks: sums of two halves are rounded otherwise than
    sums of all, in stock as well. All else is held against one rank."""
    model = prepared(family)
    arguments = PRESSED[family] | {"memory_backend": "jenga", "env": COMPARED}
    if family == "mllama":
        arguments |= {"waves": [PICTURED, PICTURED], "chunked_prefill_size": -1}

    one = serve(model, prepare=admit_too_many, **arguments)
    two = serve(model, prepare=admit_too_many, tp_size=2, **arguments)

    assert two.outputs == stock(family, model)
    assert two.cached == one.cached
    assert two.hit_tokens == one.hit_tokens > 0
    assert two.retractions == one.retractions > 0
    assert same(traces(one.log, 0), traces(two.log, 0), traces(two.log, 1))


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            one_large_page_fewer,
            r"Refused: --memory-backend jenga: ranks with the same requests must be alike, and "
            r"differ in number of large pages \(641 on rank 0; 640 on rank 1\): start them with ",
        ),
        (
            hits_refresh_nothing,
            r"RanksDiffer: ranks with the same requests differ in round \d+ in "
            r"(allocations|evictions) \(.* on rank 0; .* on rank 1\)",
        ),
    ],
)
def test_a_rank_that_is_not_like_the_others_ends_the_server(prepared, fault, line: str):
    with pytest.raises(EngineFailed, match=line):
        serve(
            prepared("llama"),
            waves=[FIRST, FIRST, go_on],
            prepare=fault,
            tp_size=2,
            env=COMPARED,
            memory_backend="jenga",
            max_total_tokens=640,
        )


@pytest.mark.parametrize(
    ("family", "arguments", "what"),
    [
        ("jet_nemotron", {"tp_size": 2}, "layer 1 has 2 KV heads of 16 and 16, its group 1 KV"),
        (
            "llama",
            {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
            "layer 0 has 1 KV heads of 16 and 16, its group 2 KV heads",
        ),
    ],
)
def test_code_of_sglang_that_does_not_divide_its_layers_so_is_refused(
    prepared, family: str, arguments: dict[str, Any], what: str
):
    """Stock SGLang dies of both, at its first forward."""
    with pytest.raises(EngineFailed, match=f"Refused: .* otherwise than planned: {what}"):
        serve(prepared(family), memory_backend="jenga", **arguments)


# ---- data parallel --------------------------------------------------------------------------


def test_two_data_parallel_servers_answer_as_one_does(prepared):
    model = prepared("gemma3_text")

    one, two = (
        serve(model, memory_backend="jenga", max_total_tokens=1000, dp_size=size) for size in (1, 2)
    )

    assert two.outputs == one.outputs
    for rank in (0, 1):
        assert re.search(rf" DP{rank}\] Prefill batch, ", two.log)


ATTENTION = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
WAVES = [FIRST[:1], FIRST[4:7], FIRST]
"""One of two ranks is idle; one has a row of padding; both are busy."""


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_with_dp_attention_padding_touches_nothing_and_tokens_are_one_servers(
    prepared, family: str
):
    model = prepared(family)
    states = STOCK_STATES if family == "qwen3_next" else {}
    arguments = states | {"waves": WAVES, "memory_backend": "jenga"}

    one = serve(model, **arguments)
    two = serve(model, prepare=tell_of_untaken_pages, **(arguments | ATTENTION))

    assert two.outputs == one.outputs
    assert two.hit_tokens > 0
    told = [tuple(map(int, found)) for found in UNTAKEN.findall(two.log)]
    assert {rank for rank, taken, _, _ in told if taken} == {0, 1}
    assert [others for _, _, others, _ in told if others] == []


def test_a_row_of_padding_that_touches_a_page_would_be_seen(prepared):
    def planted() -> None:
        tell_of_untaken_pages()
        padding_lies_in_a_page()

    run = serve(
        prepared("qwen3"), prepare=planted, waves=WAVES, memory_backend="jenga", **ATTENTION
    )

    assert [int(others) for _, _, others, _ in UNTAKEN.findall(run.log) if others != "0"]


# ---- the ordinary way -----------------------------------------------------------------------


def test_the_ranks_of_each_group_of_dp_attention_do_the_same(prepared):
    """Four ranks in two groups, and each group does something else."""
    model = prepared("qwen3")
    expected = serve(model, waves=[FIRST], memory_backend="jenga").outputs[0]
    flags = ("--tp", "4", "--dp", "2", "--enable-dp-attention", "--memory-backend", "jenga")

    flags += ("--max-total-tokens", "700")
    with Server(model, *flags, env=COMPARED, launcher=shared_warm_launcher()) as server:
        answers = [server.generate(FIRST, NEW_TOKENS) for _ in range(2)]
        server.flush_cache()  # everybody is idle by then
        log = server.log()

    for wave in answers:
        assert [answer.output_ids for answer in wave] == expected
    assert sum(answer.cached_tokens for answer in answers[1]) > 0
    said = {
        (int(group), int(rank)): trace
        for group, rank, trace in re.findall(r" DP(\d) TP(\d)\] jenga rank trace: (.*)$", log, re.M)
    }
    assert set(said) == {(0, 0), (0, 1), (1, 2), (1, 3)}
    assert said[0, 0] == said[0, 1] != said[1, 2] == said[1, 3]


BEGIN = """
import sys
sys.path.insert(0, {root!r})
from tests.servers.ranks import one_large_page_fewer as load
"""


def test_a_rank_with_another_plan_is_refused_with_one_line(prepared, tmp_path):
    """The fault comes in as a plugin, since ranks are spawned."""
    info = tmp_path / "rank_fault-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rank-fault\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nfault = rank_fault:load\n")
    (tmp_path / "rank_fault.py").write_text(BEGIN.format(root=str(ROOT)))
    command = ("--model-path", str(prepared("llama")), "--tp", "2", "--memory-backend", "jenga")

    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", *with_defaults(command, CPU_FLAGS)],
        env=os.environ | CPU_ENV | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "sglang-jenga: --memory-backend jenga: ranks with the same requests must be alike, and "
        "differ in number of large pages (4097 on rank 0; 4096 on rank 1): start them with the "
        "same packages, variables, arguments and memory"
    )
