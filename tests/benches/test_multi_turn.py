"""The multi-turn benchmark: its arithmetic, its streaming client, and one real comparison."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from aiohttp import web

from benchmarks import multi_turn, plotting
from benchmarks.chats import report
from benchmarks.chats.load import Load, Turn
from benchmarks.chats.report import by_round, identical, percentile, ratio, summarize
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.warm import WarmLauncher

SMALL = ["--think-time", "0", "--answer-tokens", "6", "--message-tokens", "8"]


def turn(round_=0, *, branch=0, prompt=100, cached=0, ttft=0.1, gaps=(), tokens=4, error=None):
    ids = list(range(tokens))
    return Turn(round_, 0, branch, prompt, cached, ttft, 1.0, list(gaps), ids, error)


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3, 1, 2], 50, 2),
        ([1, 2, 3, 4], 50, 2.5),
        ([7], 99, 7),
        (range(101), 99, 99),
        ([1, 2], 0, 1),
        ([1, 2], 100, 2),
        ([], 50, None),
    ],
)
def test_percentiles_are_interpolated_between_neighbours(values, percent, expected):
    assert percentile(list(values), percent) == expected


def test_the_hit_rate_weighs_requests_by_their_prompts():
    got = summarize([turn(prompt=100, cached=0), turn(prompt=300, cached=200)], slo_ttft=1)

    assert (got.prompt_tokens, got.cached_tokens, got.hit_rate) == (400, 200, 0.5)


def test_goodput_counts_only_answers_whose_first_token_came_in_time():
    turns = [turn(ttft=0.1, tokens=10), turn(ttft=0.5, tokens=20), turn(ttft=0.6, tokens=40)]

    got = summarize(turns, slo_ttft=0.5, seconds=2.0)

    assert (got.in_slo, got.goodput) == (2, 15.0)


def test_a_failed_request_counts_as_a_request_and_nowhere_else():
    failed = turn(prompt=999, cached=999, ttft=9.0, gaps=[9.0], error="no route")

    alone, beside = (summarize(turns, 1, 1.0) for turns in ([turn()], [turn(), failed]))

    assert (beside.requests, beside.failed) == (2, 1)
    assert (alone.hit_rate, alone.ttft_p99, alone.goodput) == (
        beside.hit_rate,
        beside.ttft_p99,
        beside.goodput,
    )


def test_what_was_not_measured_has_no_number():
    got = summarize([], slo_ttft=1, seconds=1.0)

    assert (got.hit_rate, got.ttft_median, got.itl_p99) == (None, None, None)
    assert summarize([turn()], slo_ttft=1).goodput is None


def test_gaps_of_all_requests_make_one_distribution():
    got = summarize([turn(gaps=[1, 2]), turn(gaps=[3, 4, 5])], slo_ttft=1)

    assert (got.itl_median, got.itl_p99) == (3, pytest.approx(4.96))


def test_every_round_is_summed_up_alone():
    got = by_round([turn(0, cached=10), turn(2, cached=30), turn(2, cached=5)], 3, slo_ttft=1)

    assert [numbers.cached_tokens for numbers in got] == [10, 0, 35]


@pytest.mark.parametrize(("value", "base"), [(None, 1.0), (1.0, None), (1.0, 0)])
def test_there_is_no_ratio_to_nothing(value, base):
    assert ratio(value, base) is None


def test_answers_are_compared_place_by_place():
    one = [turn(0, tokens=3), turn(1, branch=0, tokens=3), turn(1, branch=1, tokens=4)]
    other = [turn(1, branch=1, tokens=4), turn(1, branch=0, tokens=5), turn(0, tokens=3)]

    assert identical(one, other) == 2


# ---- the load -----------------------------------------------------------------------------------


def test_a_load_counts_its_trunks_once_and_every_branch():
    load = Load(rounds=5, clients=3, branching=2, branch_at=2)

    assert load.turns() == 3 * (2 + 3 * 2)


def test_texts_follow_from_the_seed_and_their_place_alone():
    load = Load()

    assert load.tokens(20, "message", 0, 1, 2) == load.tokens(20, "message", 0, 1, 2)
    assert load.tokens(20, "message", 0, 1, 2) != load.tokens(20, "message", 0, 2, 1)
    assert load.tokens(20, "message") != Load(seed=1).tokens(20, "message")


# ---- the client ---------------------------------------------------------------------------------


class FakeServer:
    """Answers with the prompt's length and counting up, in chunks of two tokens.

    `incremental`: a chunk holds its own ids only; `broken`: the stream reports an error instead.
    """

    def __init__(self, *, incremental=False, broken=False):
        self.incremental, self.broken = incremental, broken
        self.prompts = []

    async def generate(self, request):
        body = await request.json()
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self.prompts.append(prompt)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        answer = [len(prompt) + index for index in range(count)]
        for end in range(2, count + 1, 2):
            meta = {"completion_tokens": end, "cached_tokens": len(prompt) // 2}
            ids = answer[end - 2 if self.incremental else 0 : end]
            event = {"output_ids": ids, "meta_info": meta}
            if self.broken:
                event = {"error": {"message": "out of luck"}}
            await reply.write(f"data: {json.dumps(event)}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        return reply

    def __enter__(self):
        started = threading.Event()

        async def serve():
            app = web.Application()
            app.router.add_post("/generate", self.generate)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await self.stop.wait()
            await runner.cleanup()

        self.thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self.thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *exc):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


def play(tmp_path, url, *arguments):
    """Run the benchmark against `url`; return its exit status and what it wrote as JSON."""
    path = tmp_path / "out.json"
    plot = ["--plot", str(tmp_path / "out.svg")]
    status = multi_turn.main(["--base-url", url, "--json", str(path), *plot, *SMALL, *arguments])
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("incremental", [False, True])
def test_a_conversation_goes_on_from_the_answers_of_the_server(tmp_path, incremental):
    with FakeServer(incremental=incremental) as server:
        status, _ = play(tmp_path, server.url, "--rounds", "3", "--clients", "1", "--branching=1")

    assert status == 0
    for before, after in pairwise(server.prompts):
        answer = [len(before) + index for index in range(6)]
        assert after[: len(before) + 6] == before + answer


def test_branches_share_what_was_said_before_they_part(tmp_path):
    with FakeServer() as server:
        flags = ("--rounds", "2", "--clients", "1", "--branching", "3", "--branch-at", "1")
        play(tmp_path, server.url, *flags)

    trunk, *branches = server.prompts
    shared = len(trunk) + 6
    assert len(branches) == 3
    assert len({tuple(prompt[:shared]) for prompt in branches}) == 1
    assert len({tuple(prompt[shared:]) for prompt in branches}) == 3


def test_the_report_has_every_turn_and_sums_up_cached_tokens(tmp_path):
    with FakeServer() as server:
        _, result = play(tmp_path, server.url, "--rounds", "4", "--clients", "2")

    measured = result["servers"]["server"]
    assert measured["total"]["requests"] == len(measured["turns"]) == 2 * (1 + 3 * 2)
    assert measured["total"]["cached_tokens"] == sum(len(p) // 2 for p in server.prompts)
    assert [numbers["requests"] for numbers in measured["rounds"]] == [2, 4, 4, 4]
    assert all(one["ttft"] > 0 for one in measured["turns"])


def test_the_plot_is_an_svg_with_a_line_per_panel(tmp_path):
    with FakeServer() as server:
        play(tmp_path, server.url, "--rounds", "3", "--clients", "1")

    root = ElementTree.parse(tmp_path / "out.svg").getroot()
    paths = root.iter("{http://www.w3.org/2000/svg}path")
    lines = [path for path in paths if report.COLOURS[0] in path.get("style", "")]
    corners = [path.get("d").split() for path in lines if "fill: none" in path.get("style")]
    assert [len(path) for path in corners] == [1 + 3 * 2] * len(report.PANELS)


def test_a_plot_that_nothing_can_draw_is_refused_before_the_first_round(monkeypatch, capsys):
    monkeypatch.setattr(plotting, "missing", lambda: "plots need a pen")

    with pytest.raises(SystemExit) as stopped:
        multi_turn.parse(["--base-url", "http://nobody", "--plot", "x.svg"])

    assert stopped.value.code == 2
    assert "--plot: plots need a pen" in capsys.readouterr().err


def test_an_error_in_the_stream_fails_the_request_and_the_run(tmp_path, capsys):
    with FakeServer(broken=True) as server:
        flags = ("--rounds", "1", "--clients", "1", "--branching", "1")
        status, result = play(tmp_path, server.url, *flags)

    assert status == 1
    assert result["servers"]["server"]["total"]["failed"] == 1
    assert "out of luck" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_reported(tmp_path, capsys):
    status, _ = play(tmp_path, "http://127.0.0.1:9", "--rounds", "1", "--clients", "1")

    assert status == 1
    assert "requests failed; the first: ClientConnectorError" in capsys.readouterr().err


# ---- stock against jenga ------------------------------------------------------------------------


@pytest.mark.slow
def test_stock_and_jenga_play_the_same_load_and_are_compared(tmp_path):
    model = write_tiny_model("gemma3_text", tmp_path / "gemma3_text", num_layers=6, window=32)
    flags = ["--ab", "--cpu", "--model-path", str(model), "--rounds", "3", "--clients", "2"]
    options = multi_turn.parse([*flags, *SMALL])
    load = multi_turn.load_of(options)

    with WarmLauncher() as launcher:
        players = multi_turn.compare(load, options, launcher)

    result = report.report(players, load, options.slo_ttft)
    stock, jenga = (result["servers"][name]["total"] for name in ("stock", "jenga"))
    assert stock["failed"] == jenga["failed"] == 0
    assert stock["requests"] == jenga["requests"] == result["identical"] == 2 * (1 + 2 * 2)
    assert stock["prompt_tokens"] == jenga["prompt_tokens"]
    assert min(stock["cached_tokens"], jenga["cached_tokens"]) > 0
    assert all(value > 0 for value in result["ratio"].values())
    assert "jenga / stock" in report.total_table(result)
