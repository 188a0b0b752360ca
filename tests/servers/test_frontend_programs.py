"""Programs in SGLang's frontend language: the same answers on stock and on jenga, prefixes hit."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise

import pytest
import sglang as sgl

from examples import chat, few_shot, parallel_tools, tree_of_thought
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.warm import shared_warm_launcher

pytestmark = pytest.mark.slow
PROGRAMS = {
    "chat": chat,
    "few_shot": few_shot,
    "tree_of_thought": tree_of_thought,
    "parallel_tools": parallel_tools,
}
FLAGS = {"stock": (), "jenga": ("--memory-backend", "jenga")}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gemma3_text"
    model = write_tiny_model("gemma3_text", folder, num_layers=6, window=32)
    launcher = shared_warm_launcher()
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Server(model, *flags, launcher=launcher))
            for name, flags in FLAGS.items()
        }


@pytest.fixture(scope="module")
def answers(servers):
    """By program and backend, each from an empty cache."""
    got = {}
    for backend, server in servers.items():
        endpoint = sgl.RuntimeEndpoint(server.url)
        for name, program in PROGRAMS.items():
            server.flush_cache()
            got[name, backend] = program.run(endpoint, max_tokens=12)
    return got


@pytest.mark.parametrize("name", PROGRAMS)
def test_jenga_gives_the_answers_of_stock(answers, name):
    stock = [answer.text for answer in answers[name, "stock"]]

    assert all(stock)
    assert [answer.text for answer in answers[name, "jenga"]] == stock


@pytest.mark.parametrize("backend", FLAGS)
def test_a_chat_computes_no_turn_before_the_last_one_again(answers, backend):
    turns = answers["chat", backend]

    # The text of an answer may be cut into other tokens than it was generated in.
    assert turns[0].cached_tokens == 0
    for before, after in pairwise(turns):
        assert after.cached_tokens >= before.prompt_tokens


@pytest.mark.parametrize("backend", FLAGS)
@pytest.mark.parametrize("name", ["few_shot", "tree_of_thought", "parallel_tools"])
def test_branches_compute_only_what_is_their_own(answers, name, backend):
    for answer in answers[name, backend]:
        assert answer.cached_tokens > 0.7 * answer.prompt_tokens


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_from_the_command_line(servers, name, monkeypatch, capsys):
    arguments = ["--base-url", servers["jenga"].url, "--max-tokens", "4"]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])

    PROGRAMS[name].main()

    assert "tokens cached]" in capsys.readouterr().out
