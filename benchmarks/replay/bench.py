"""Tables of replays: who fits, what hits and what is wasted, for real models' layer mixes.

    python -m benchmarks.replay.bench                                # the quick profile
    python -m benchmarks.replay.bench --profile full --trace conversation_trace.jsonl \\
        --json results --plots benchmarks/results/plots

Prints Markdown. With --json a stopped run goes on where it was, and options that select fewer
models or workloads print a part of the same table. The trace is published in kvcache-ai/Mooncake.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import plotting
from benchmarks.replay import tables
from benchmarks.replay.baselines import BASELINES
from benchmarks.replay.cells import Cell, Missing, play
from benchmarks.replay.facts import facts
from benchmarks.replay.geometries import GEOMETRIES
from benchmarks.replay.profiles import DENSE, DEPLOYMENTS, PROFILES, Profile
from benchmarks.replay.requests import Load, Workload
from benchmarks.replay.result import Result
from sglang_jenga.testing.engines import preload

MOONCAKE = "mooncake"


def build_workloads(
    options: argparse.Namespace, profile: Profile
) -> tuple[dict[str, Workload], dict[str, str]]:
    """Workloads by name, and why others are missing."""
    specs = {name: varied(load, options) for name, load in profile.workloads.items()}
    missing = {}
    if profile.trace is not None:
        if options.trace is not None:
            specs = {MOONCAKE: varied(profile.trace(options.trace), options), **specs}
        else:
            missing[MOONCAKE] = "no --trace was given"
    wanted = options.workloads or [*specs]
    unknown = set(wanted) - {*specs, *missing}
    if unknown:
        raise ValueError(f"no workload {', '.join(sorted(unknown))} in this profile: {[*specs]}")
    return {name: specs[name].build() for name in wanted if name in specs}, missing


def varied(load: Load, options: argparse.Namespace) -> Load:
    """The same kind of load, drawn otherwise, or with requests that come sooner one after another.
    One whose next request waits for an answer keeps its pauses."""
    changes: dict[str, Any] = {}
    for name, change in (
        ("seed", lambda seed: seed + options.seed),
        ("rate", lambda rate: rate * options.faster),
        ("gap", lambda gap: gap / options.faster),
        ("faster", lambda faster: faster * options.faster),
    ):
        if hasattr(load, name):
            changes[name] = change(getattr(load, name))
    return dataclasses.replace(load, **changes)


def cells_of(
    options: argparse.Namespace, profile: Profile, workloads: Mapping[str, Workload]
) -> list[Cell]:
    """Loads with images are for models that see them, all others for those that do not.

    Raises ValueError if no cell is left.
    """
    models = options.models or profile.models
    cells = [
        Cell(model, name, baseline)
        for model in models
        for name, load in workloads.items()
        for baseline in options.baselines or profile.baselines
        if load.shows_images == (GEOMETRIES[model].real.encoder > 0)
    ]
    if not cells:
        raise ValueError(
            f"{', '.join(workloads)}: not for {', '.join(models)} (loads with images are for "
            "models that see them, and no others are)"
        )
    return cells


def play_all(
    options: argparse.Namespace,
    profile: Profile,
    workloads: Mapping[str, Workload],
    cells: Sequence[Cell],
) -> tuple[dict[Cell, Result], dict[Cell, Missing]]:
    results: dict[Cell, Result] = {}
    missing: dict[Cell, Missing] = {}
    limits = profile.limits
    if options.seconds is not None:
        limits = limits._replace(seconds=options.seconds)
    for number, cell in enumerate(cells, 1):
        started = time.perf_counter()
        deployment = DEPLOYMENTS[cell.model]
        found = play(
            cell,
            workloads[cell.workload],
            deployment,
            limits,
            options.json,
            only_stored=options.only_stored,
        )
        seconds = time.perf_counter() - started
        if isinstance(found, Missing):
            missing[cell] = found
            line = found.why
        else:
            results[cell] = found
            line = (
                f"{found.totals['modelled_tokens_per_s']:,.0f} tokens/s modelled, "
                f"{found.totals['host_ms_per_step']:.2f} ms of host a step"
            )
        print(f"[{number}/{len(cells)}] {cell}: {line} ({seconds:.0f} s)", file=sys.stderr)
    return results, missing


def report(
    results: Mapping[Cell, Result],
    missing: Mapping[Cell, Missing],
    workloads: Mapping[str, Workload],
    not_built: Mapping[str, str],
) -> str:
    """The whole report as Markdown."""
    parts = [machine()]
    parts.append(tables.workload_table({name: facts(load) for name, load in workloads.items()}))
    parts += [f"* *{name}*: {load.described}" for name, load in workloads.items()]
    if results:
        parts.append(tables.pool_table(results))
        parts.append(tables.ratio_table(results, DENSE))
        parts.append(tables.means_by(results, DENSE, "model"))
        parts.append(tables.means_by(results, DENSE, "workload"))
        parts.append(tables.ablation_table(results))
        parts.append(tables.cell_table(results))
    parts.append(tables.missing_table(missing, not_built))
    return "\n\n".join(part for part in parts if part)


def machine() -> str:
    """Where this ran and with what."""
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "numpy"))
    command = shlex.join(["python", "-m", "benchmarks.replay.bench", *sys.argv[1:]])
    return (
        f"    {command}\n\nPython {platform.python_version()}, {packages}; {platform.machine()}, "
        f"{cores} cores. Columns with `~` are modelled, all others measured; host times are of "
        "this machine, memory facts of any."
    )


def plot_all(results: Mapping[Cell, Result], folder: Path) -> None:
    """The compared baselines only: ablations and rival page sizes would hide them."""
    from benchmarks.replay.plots import write_plots  # matplotlib: replaying needs none

    by_model: dict[str, dict[str, dict[str, Result]]] = {}
    for cell, result in results.items():
        if cell.baseline in ("stock", "stock-best", "unified", "jenga"):
            by_workload = by_model.setdefault(cell.model, {})
            by_workload.setdefault(cell.workload, {})[cell.baseline] = result
    for model, by_workload in by_model.items():
        for path in write_plots(model, by_workload, folder):
            print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)", file=sys.stderr)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, not {text}")
    return number


def parser_of_cells(description: str | None) -> argparse.ArgumentParser:
    """Options that say which cells: what `build_workloads` and `cells_of` read."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=[*PROFILES], default="quick")
    parser.add_argument("--models", nargs="+", choices=[*GEOMETRIES], metavar="MODEL")
    parser.add_argument("--workloads", nargs="+", metavar="WORKLOAD")
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation_trace.jsonl")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="added to each load's: another draw of it"
    )
    parser.add_argument(
        "--faster", type=_above_zero, default=1, metavar="X", help="requests come X times as fast"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = parser_of_cells(__doc__)
    parser.add_argument("--baselines", nargs="+", choices=[*BASELINES], metavar="BASELINE")
    parser.add_argument("--json", type=Path, metavar="DIR", help="keep results here and go on")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="most that a replay may take on this machine"
    )
    parser.add_argument("--only-stored", action="store_true", help="play nothing: report --json")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write SVG files here")
    options = parser.parse_args(argv)
    if options.plots and (missing := plotting.missing()):
        parser.error(f"--plots: {missing}")
    profile = PROFILES[options.profile]
    preload()  # before anything else imports SGLang, which asks for the device once
    try:
        workloads, not_built = build_workloads(options, profile)
        cells = cells_of(options, profile, workloads)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="replay-results-") as scratch:
        options.json = options.json or Path(scratch)
        results, missing = play_all(options, profile, workloads, cells)
    print(report(results, missing, workloads, not_built))
    if options.plots:
        plot_all(results, options.plots)
    # A rival that does not boot is a finding; jenga that does not is a failure.
    failed = [cell for cell in missing if cell.baseline == "jenga"]
    for cell in failed:
        print(f"{cell} failed: {missing[cell].why}", file=sys.stderr)
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
