"""`make gpu`: what its parts come to, what is run again, and what it says of what it left out."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu import bench_parity, suite
from benchmarks.gpu.suite import PARTS, Part, Suite
from benchmarks.gpu.timing import Deadline, Report
from sglang_jenga.testing.servers import Answer

GOOD = Part("good", 60, ("-c", "print('did {device} in {out}')"), needs="")
BAD = Part("bad", 60, ("-c", "raise SystemExit(3)"), needs="")
ENDLESS = Part(
    "endless",
    5,
    (
        "-S",
        "-c",
        "import subprocess, sys; subprocess.run([sys.executable, '-Sc', 'while 1: pass'])",
    ),
    needs="",
)
CARD = Part("card", 60, ("-c", "print('a card')"))


def suite_in(folder: Path, *, minutes: float = 5, key: str = "abc on a card", device="cpu"):
    return Suite(folder, device, minutes, key)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    found = suite_in(tmp_path).run([BAD, GOOD, CARD])

    assert [(o.name, o.result, o.why) for o in found] == [
        ("bad", "failed", "with status 3"),
        ("good", "passed", ""),
        ("card", "skipped", "it needs a GPU"),
    ]
    assert f"did cpu in {tmp_path}" in (tmp_path / "log.txt").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("abc on a card.\n")
    assert "| bad | failed with status 3 |" in summary
    assert "| card | skipped it needs a GPU |" in summary
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [part["result"] for part in record["parts"]] == ["failed", "passed", "skipped"]


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LEAST_SECONDS", 0)
    start = time.monotonic()

    (found,) = suite_in(tmp_path).run([ENDLESS._replace(seconds=0.3)])

    assert (found.result, found.why) == ("stopped", "after 0.3 s")
    assert time.monotonic() - start < 20


def test_without_time_left_a_part_says_so(tmp_path):
    (found,) = suite_in(tmp_path, minutes=0.01).run([GOOD])

    assert (found.result, found.why) == ("skipped", "no time was left")


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    suite_in(tmp_path).run([GOOD, BAD])
    log = tmp_path / "log.txt"
    before = log.read_text()

    found = suite_in(tmp_path).run([GOOD, BAD])

    assert [o.result for o in found] == ["passed", "failed"]
    assert log.read_text().count("\ndid cpu") == before.count("\ndid cpu") == 1
    assert log.read_text().count("SystemExit(3)") == 2  # what failed is tried again
    suite_in(tmp_path).run([GOOD], again=True)
    assert log.read_text().count("\ndid cpu") == 2


def test_another_commit_or_machine_begins_anew(tmp_path):
    suite_in(tmp_path).run([GOOD])
    suite_in(tmp_path, key="def on a card").run([GOOD])

    assert (tmp_path / "log.txt").read_text().count("\ndid cpu") == 2


def test_all_parts_together_fit_the_time_that_is_promised():
    assert sum(part.seconds for part in PARTS) <= 60 * (suite.MINUTES + 2)
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    for part in PARTS:  # every blank in the arguments is filled
        blanks = {"out": "o", "minutes": "1", "device": "cpu", "key": "abc on a card"}
        assert not any("{" in argument.format(**blanks) for argument in part.arguments)


def test_parity_deals_every_way_of_serving_to_every_backend():
    dealt = list(bench_parity.cells("cuda", list(bench_parity.MODELS)))

    for backend in ("fa3", "flashinfer", "triton"):
        mine = [cell for cell in dealt if cell.backend == backend]
        assert {cell.overlap for cell in mine} == {True, False}
        assert {cell.graphs for cell in mine} == {True, False}
    assert {cell.page_size for cell in dealt} == {1, 16, 64}
    assert {cell.model for cell in dealt} == set(bench_parity.MODELS)
    assert {cell.backend for cell in dealt} == set(bench_parity.BACKENDS["cuda"])
    # What the plugin or SGLang would refuse on the way.
    assert all(c.model == "llama" and c.page_size > 1 for c in dealt if c.backend == "trtllm_mha")
    stateless = [c for c in dealt if c.model in bench_parity.STATES and not c.overlap]
    assert {cell.page_size for cell in stateless} <= {1}


def table(folder: Path) -> dict[str, str]:
    return {"json_path": str(folder / "rows.json"), "markdown_path": str(folder / "rows.md")}


def parity(folder: Path, monkeypatch, *, key: str, wrong: int = 0, alike: int = 20):
    """What `bench_parity` comes to on a machine that has three cells, and the cells it has run."""
    ran = []

    def row(cell, model_folder, device):
        ran.append(cell)
        found = {"answers": alike, "differing": wrong, "others": 0, "others_differing": 0}
        return cell.shown() | found | {"hit_tokens": 7, "seconds": 1}

    monkeypatch.setattr(bench_parity, "row", row)
    monkeypatch.setattr(bench_parity, "write_tiny_model", lambda *_, **__: None)
    todo = list(bench_parity.cells("cuda", ["llama"]))[:3]
    report = Report("parity", bench_parity.COLUMNS, "it", "a card", key=key, **table(folder))
    status = bench_parity.run(todo, report.earlier(), Deadline(60), report, "cuda")
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    return status, len(ran), len(rows), report.notes


def test_parity_goes_on_with_the_cells_that_are_left(tmp_path, monkeypatch):
    passed = Deadline.passed
    asked = iter((False, False, True))
    monkeypatch.setattr(Deadline, "passed", lambda self: next(asked))

    first = parity(tmp_path, monkeypatch, key="abc")

    assert first == (suite.UNFINISHED, 2, 2, ["time was up after 2 of 3 cells"])
    monkeypatch.setattr(Deadline, "passed", passed)
    assert parity(tmp_path, monkeypatch, key="abc") == (0, 1, 3, [])
    assert parity(tmp_path, monkeypatch, key="def") == (0, 3, 3, [])  # another commit or card


def test_parity_asks_again_where_answers_differed(tmp_path, monkeypatch):
    assert parity(tmp_path, monkeypatch, key="abc", wrong=1) == (1, 3, 3, [])
    assert parity(tmp_path, monkeypatch, key="abc") == (0, 3, 3, [])


def test_a_cell_in_which_nothing_could_be_compared_is_not_right(tmp_path, monkeypatch):
    assert parity(tmp_path, monkeypatch, key="abc", alike=0) == (1, 3, 3, [])
    assert parity(tmp_path, monkeypatch, key="abc") == (0, 3, 3, [])


def answer(ids: list[int], cached: int) -> Answer:
    return Answer(ids, {"cached_tokens": cached})


def test_an_answer_that_was_hit_elsewhere_is_counted_apart_and_so_is_what_goes_on_from_it():
    stock = [answer([1], 0), answer([2], 0), answer([3], 8), answer([4], 8)]
    ours = [answer([1], 0), answer([9], 4), answer([8], 8), answer([9], 8)]

    found = bench_parity.compare(stock, ours)

    assert (found["answers"], found["differing"]) == (2, 1)
    assert (found["others"], found["others_differing"]) == (2, 2)
    assert found["hit_tokens"] == 20


TABLE = """
import json, sys
folder, status = sys.argv[1:3]
open(f"{folder}/rows.json", "w").write(json.dumps({"notes": ["fa3: there is none"]}))
raise SystemExit(int(status))
"""


@pytest.mark.parametrize(("status", "result"), [(0, "passed"), (suite.UNFINISHED, "unfinished")])
def test_the_summary_says_what_a_table_leaves_out(tmp_path, status: int, result: str):
    code = TABLE.replace("{", "{{").replace("}", "}}")  # no blanks to be filled
    arguments = ("-c", code, "{out}", str(status), "--json", "{out}/rows.json")
    part = Part("parity", 60, arguments, needs="")

    (found,) = suite_in(tmp_path).run([part])

    assert (found.result, found.is_bad) == (result, status != 0)
    assert "\n* parity: fa3: there is none\n" in (tmp_path / "summary.md").read_text()
    again = suite_in(tmp_path)
    assert (again.kept(part) is None) == (status != 0)  # what is unfinished goes on


@pytest.mark.slow
def test_with_the_cpu_engine_as_the_device_parity_runs_to_its_table(tmp_path):
    status = suite.main(["--device", "cpu", "--out", str(tmp_path)])

    parts = {o["name"]: o for o in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert status == 0, (tmp_path / "log.txt").read_text()[-4000:]
    assert parts.pop("parity")["result"] == "passed"
    assert {o["why"] for o in parts.values()} == {"it needs a GPU"}
    (row,) = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert (row["model"], row["differing"], row["answers"]) == ("llama", 0, 20)
    assert row["hit_tokens"] > 0
