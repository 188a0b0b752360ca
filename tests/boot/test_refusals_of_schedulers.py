"""What a scheduler leaves behind as it ends reaches whoever waits for it, as one line."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.tiny_models import write_tiny_model

LINE = "--memory-backend jenga: the pool is too small"
BEGIN = """
import multiprocessing, os, tempfile, time
from pathlib import Path
from sglang_jenga.boot import flags, refusal
from sglang_jenga.testing.built_pools import configurator

def died(*_):
    raise RuntimeError("a scheduler died")

def hung_up(*_):
    raise EOFError

def started():
    rank = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    rank.start()
    return rank

def outcome(act):
    try:
        return act()
    except BaseException as error:
        return [type(error).__name__, str(error)]

with configurator({model!r}, 1 << 20, memory_backend="jenga") as made:
    record = made.server_args
    place = Path(record._jenga_refusal)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def ask(launcher, model):
    """Run lines in a launcher's process that is about to wait for schedulers."""

    def ask(lines: str):
        indented = "".join(f"    {line}\n" for line in lines.strip().splitlines())
        return launcher.run(BEGIN.format(model=model) + indented)["found"]

    return ask


def test_a_scheduler_that_died_without_a_word_is_reported_as_by_sglang(ask):
    said = ask("answer = {'found': outcome(lambda: refusal.wait_for_schedulers(died, [], []))}")

    assert said == ["RuntimeError", "a scheduler died"]


def test_schedulers_that_are_ready_are_waited_for_as_by_sglang(ask):
    ready = "refusal.wait_for_schedulers(lambda readers, ranks: [readers, ranks], [1], [2])"

    assert ask(f"answer = {{'found': {ready}}}") == [[1], [2]]


def test_who_built_an_engine_gets_the_line_as_an_error_and_no_rank_is_left(ask):
    error, left = ask(
        f"""
rank = started()
place.write_text({LINE!r})
error = outcome(lambda: refusal.wait_for_schedulers(died, [], [rank]))
answer = {{"found": [error, [rank.is_alive(), place.exists()]]}}
"""
    )

    assert error == ["Refused", LINE]
    assert left == [False, False]


def test_a_launcher_ends_with_the_line_alone(ask):
    status, text, left = ask(
        f"""
record._memory_backend_cli = True
place.write_text({LINE!r})
said = Path(tempfile.mkdtemp()) / "said"
pid = os.fork()
if pid == 0:
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        refusal.wait_for_schedulers(died, [], [started()])
    finally:
        os._exit(9)  # it may not go on as a second launcher
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
answer = {{"found": [status, said.read_text(), place.exists()]}}
"""
    )

    assert (status, left) == (1, False)
    assert text.splitlines()[-1] == f"sglang-jenga: {LINE}"
    assert "Traceback" not in text


def test_a_controller_ends_as_quietly_as_its_schedulers(ask):
    silent, told = ask(
        f"""
silent = outcome(lambda: refusal.launch_group(hung_up, None, record))
place.write_text({LINE!r})
told = outcome(lambda: refusal.launch_group(hung_up, None, record))
place.unlink()
answer = {{"found": [silent, told]}}
"""
    )

    assert silent[0] == "EOFError"
    assert told == ["SystemExit", "1"]


def test_a_controller_whose_schedulers_start_hands_on_what_they_say(ask):
    handed = "refusal.launch_group(lambda self, record, port: port, None, record, 7)"

    assert ask(f"answer = {{'found': {handed}}}") == 7
