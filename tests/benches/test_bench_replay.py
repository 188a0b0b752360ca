"""The replay's report: its arithmetic on hand-made results, and one small table of real replays."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.replay import bench, tables
from benchmarks.replay.cells import Cell, Deployment, Limits, Missing, play
from benchmarks.replay.engine import ReplayFailed, TookTooLong
from benchmarks.replay.plots import hit_panel, memory_panel, on_grid, write_plots
from benchmarks.replay.requests import Request, Workload
from benchmarks.replay.result import Result, Served, Steps, from_json, to_json

POOL = 1000
TOTALS = {
    "mean_running": 4.0,
    "mean_running_per_decode_step": 3.0,
    "peak_running": 6.0,
    "hit_tokens": 1000.0,
    "recomputed_tokens": 20.0,
    "retractions": 2.0,
    "wasted_share": 0.125,
    "modelled_tokens_per_s": 50.0,
    "host_paced_tokens_per_s": 40.0,
    "ttft_p50": 1.0,
    "ttft_p99": 2.0,
    "itl_p50": 0.01,
    "itl_p99": 0.02,
    "host_ms_per_step": 2.0,
    "host_ms_p99": 9.25,
    "host_seconds": 3.0,
}


def result(speed=50.0, *, steps=4, **totals) -> Result:
    time = [float(i + 1) for i in range(steps)]
    return Result(
        Steps(
            time,
            running=[1, 2, 3, 4][:steps],
            waiting=[0] * steps,
            held={"full": [100] * steps, "window(8)": [50] * steps},
            cached={"full": [200] * steps, "window(8)": [0] * steps},
            empty=[650] * steps,
            wasted=[25] * steps,
        ),
        [
            Served("b", 300, 8, 300, 0, 0, arrived=0.0, first_token=4.0, finished=5.0),
            Served("a", 100, 8, 0, 0, 0, arrived=0.0, first_token=2.0, finished=3.0),
        ],
        TOTALS | {"modelled_tokens_per_s": speed} | totals,
        {
            "pool_bytes": POOL * 2**20,
            "replayed_pool_bytes": POOL,
            "scale": 2**20,
            "stock_stores": "one way",
            "clock": {"gpus": 2, "hardware": "h100"},
        },
    )


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]


# ---- ratios -------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_model_and_workload_and_their_mean_is_geometric():
    results = {
        Cell("gemma-3-27b", "shift", "stock"): result(50),
        Cell("gemma-3-27b", "shift", "jenga"): result(100),
        Cell("falcon-h1-7b", "shift", "jenga"): result(400),
        Cell("falcon-h1-7b", "shift", "stock"): result(50),
    }

    over_stock = [row[8] for row in rows(tables.ratio_table(results, dense=()))]

    assert over_stock == ["2.00x", "8.00x", "**4.00x of 2**"]


def test_the_dense_control_comes_last_and_enters_no_mean():
    results = {
        Cell("llama-3.1-8b", "shift", "stock"): result(50),
        Cell("llama-3.1-8b", "shift", "jenga"): result(50),
        Cell("gemma-3-27b", "shift", "stock"): result(50),
        Cell("gemma-3-27b", "shift", "jenga"): result(150),
    }

    found = rows(tables.ratio_table(results, dense=("llama-3.1-8b",)))

    assert [row[0] for row in found] == ["gemma-3-27b", "**geometric mean**", "llama-3.1-8b"]
    assert [row[8] for row in found] == ["3.00x", "**3.00x of 1**", "1.00x"]


def test_a_rival_that_did_not_run_leaves_a_dash_and_does_not_enter_the_mean():
    results = {
        Cell("gemma-3-27b", "shift", "jenga"): result(100),
        Cell("falcon-h1-7b", "shift", "jenga"): result(100),
        Cell("falcon-h1-7b", "shift", "unified"): result(80),
    }

    found = rows(tables.ratio_table(results, dense=()))

    assert [row[8:] for row in found] == [["-"], ["1.25x"], ["**1.25x of 1**"]]


def test_an_ablation_is_shown_over_jenga():
    results = {
        Cell("gemma-3-27b", "shift", "jenga"): result(100, hit_tokens=400.0),
        Cell("gemma-3-27b", "shift", "jenga-no-aligned"): result(80, hit_tokens=100.0),
    }

    assert rows(tables.ablation_table(results)) == [["gemma-3-27b", "shift", "0.80x / 0.25x"]]
    assert tables.ablation_table({Cell("gemma-3-27b", "shift", "jenga"): result()}) == ""


def test_cells_that_are_missing_for_one_reason_share_a_row():
    missing = {
        Cell("gemma-3-27b", "shift", "unified"): Missing("refused"),
        Cell("gemma-3-27b", "exams", "unified"): Missing("refused"),
        Cell("gemma-2-9b", "exams", "unified"): Missing("refused"),
    }

    assert rows(tables.missing_table(missing, {"mooncake": "no trace"})) == [
        ["mooncake", "", "no trace"],
        ["gemma-3-27b", "shift/unified, exams/unified", "refused"],
        ["gemma-2-9b", "exams/unified", "refused"],
    ]


def test_host_time_stands_beside_stocks_and_its_mean_ratio_is_geometric():
    results = {
        Cell("gemma-3-27b", "shift", "stock"): result(host_ms_per_step=2.0),
        Cell("gemma-3-27b", "shift", "jenga"): result(
            host_ms_per_step=3.0, host_paced_tokens_per_s=160.0
        ),
        Cell("gemma-3-27b", "exams", "stock"): result(host_ms_per_step=1.0),
        Cell("gemma-3-27b", "exams", "jenga"): result(host_ms_per_step=6.0),
    }

    assert [row[6:8] for row in rows(tables.ratio_table(results, dense=()))] == [
        ["2.00 / 3.00", "4.00x"],
        ["1.00 / 6.00", "1.00x"],
        ["**3.00x of 2**", "**2.00x of 2**"],
    ]


def test_a_cell_row_tells_measured_from_modelled():
    table = tables.cell_table({Cell("gemma-3-27b", "shift", "stock"): result()})
    header = [part.strip() for part in table.splitlines()[0].strip("|").split("|")]

    modelled = [name for name in header if name.startswith("~")]
    assert modelled == ["~tokens/s", "~with scheduling", "~TTFT p50 / p99, s", "~ITL p50 / p99, ms"]
    assert rows(table)[0][3:] == [
        "4.0 / 3.0 / 6",
        "1,000",
        "20",
        "2",
        "12.50 %",
        "50",
        "40",
        "1.00 / 2.00",
        "10.0 / 20.0",
        "2.00 / 9.2",
        "3",
    ]


# ---- cells --------------------------------------------------------------------------------------

SHORT = Workload("short", (Request("a", np.arange(1, 9), np.arange(1, 3), 0.0),), "short")
CELL = Cell("gemma-3-27b", "short", "jenga")


def play_once(folder, run, *, cell=CELL, workload=SHORT, limits=Limits(), **options):  # noqa: B008
    return play(cell, workload, Deployment("h100", 2), limits, folder, run=run, **options)


def never(*args, **kwargs):
    raise AssertionError("played again")


def test_a_finished_cell_is_read_and_not_played_again(tmp_path):
    expected = result(70)

    assert play_once(tmp_path, lambda *a, **k: expected) == expected
    assert play_once(tmp_path, never) == expected


def test_a_cell_is_played_again_when_requests_or_limits_changed(tmp_path):
    play_once(tmp_path, lambda *a, **k: result(70))
    other = Workload("short", (SHORT.requests[0]._replace(output=np.array([7])),), "short")

    with pytest.raises(AssertionError, match="played again"):
        play_once(tmp_path, never, workload=other)
    with pytest.raises(AssertionError, match="played again"):
        play_once(tmp_path, never, limits=Limits(chunk=64))


def test_a_failure_is_kept_with_its_first_and_last_line(tmp_path):
    def fail(*args, **kwargs):
        raise ReplayFailed("no boot\nmany\nlines\nValueError: no\n")

    assert play_once(tmp_path, fail) == Missing("no boot ... ValueError: no")
    assert play_once(tmp_path, never) == Missing("no boot ... ValueError: no")


def test_a_replay_that_ran_out_of_time_is_played_again_and_its_limit_makes_no_other_cell(tmp_path):
    def slow(*args, **kwargs):
        raise TookTooLong("no end in 600 s\nlog")

    assert play_once(tmp_path, slow) == Missing("no end in 600 s")
    expected = result(70)
    assert play_once(tmp_path, lambda *a, **k: expected, limits=Limits(seconds=3600)) == expected
    assert play_once(tmp_path, never) == expected


def test_a_report_of_what_is_stored_plays_nothing(tmp_path):
    assert play_once(tmp_path, never, only_stored=True) == Missing("not replayed yet")
    expected = result(70)
    play_once(tmp_path, lambda *args, **kwargs: expected)
    assert play_once(tmp_path, never, only_stored=True) == expected


def test_what_cannot_be_had_is_missing_without_being_played(tmp_path):
    found = play_once(tmp_path, never, cell=Cell("llama-3.1-8b", "short", "unified"))

    assert "stock stores this model in one pool" in found.why


def test_loads_with_images_are_played_by_models_that_see_them_and_no_others_are():
    sees, sees_not = "llama-3.2-11b-vision", "llama-3.1-8b"
    pictured = Workload("pictured", (SHORT.requests[0]._replace(encoder=4),), "")
    options = SimpleNamespace(models=[sees, sees_not], baselines=["stock", "jenga"])
    loads = {"short": SHORT, "pictured": pictured}

    cells = bench.cells_of(options, bench.PROFILES["full"], loads)

    places = {(cell.model, cell.workload) for cell in cells}
    assert places == {(sees, "pictured"), (sees_not, "short")} and len(cells) == 4
    options.models = [sees]
    with pytest.raises(ValueError, match=r"short: not for llama-3\.2-11b-vision"):
        bench.cells_of(options, bench.PROFILES["full"], {"short": SHORT})


def test_results_survive_json():
    assert from_json(to_json(result())) == result()


# ---- plots --------------------------------------------------------------------------------------


def test_samples_are_averaged_between_grid_points_and_gaps_keep_the_last_value():
    assert on_grid([0.5, 1.0, 3.5], [2, 4, 8], np.array([1.0, 2.0, 3.0, 4.0])) == [3, 3, 3, 8]


def test_the_hit_rate_counts_requests_in_the_order_of_their_first_tokens():
    (line,) = hit_panel("x", {"jenga": result()}).lines.values()
    shares = [share for _, share in line]

    # "a" (100 tokens, none hit) at 2 s, "b" (300, all hit) at 4 s, of 4 s in all.
    assert shares[len(shares) // 2 - 1] == 0.0
    assert shares[-1] == 75.0


def test_memory_of_a_run_that_ends_early_ends_in_its_panel():
    panel = memory_panel("x", result(steps=2), end=4.0)

    assert {len(values) for values in panel.layers.values()} == {len(panel.x) // 2}
    assert {name: values[-1] for name, values in panel.layers.items()} == {
        "full, running": 10.0,
        "full, cached": 20.0,
        "window(8), running": 5.0,
        "window(8), cached": 0.0,
        "empty": 65.0,
    }


def test_plots_are_small_well_formed_svg(tmp_path):
    written = write_plots(
        "model", {"shift": {"stock": result(), "jenga": result(steps=3)}}, tmp_path
    )

    assert sorted(path.name for path in written) == [
        "model-hits.svg",
        "model-memory-shift.svg",
        "model-running.svg",
        "model-waste.svg",
    ]
    for path in written:
        assert path.stat().st_size < 60_000
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


# ---- the real thing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_small_profile_plays_and_jenga_is_faster_with_a_hybrid_model(capsys, tmp_path):
    assert bench.main(["--profile", "ci", "--json", str(tmp_path)]) == 0

    text = capsys.readouterr().out
    table = text[text.index("| model | workload | decoding, stock / jenga") :]
    hybrid, _, dense = rows(table.split("\n\n")[0])
    assert hybrid[0] == "gemma-3-27b"
    assert float(hybrid[7][:-1]) > 1.05
    assert dense[0] == "llama-3.1-8b" and float(dense[7][:-1]) == pytest.approx(1, abs=0.011)
