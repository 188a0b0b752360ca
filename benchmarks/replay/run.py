"""Replay a workload on one geometry and one baseline, and write what was found as JSON.

    python -m benchmarks.replay.run --geometry gemma-3-27b --workload chats --baseline jenga \\
        --pool-gib 16 --json out.json

Memory facts are measured on SGLang's own scheduler, allocator and tree; times are modelled by
`clock.py`. `pool_bytes` are bytes of the real model's GPUs: the replayed pool is `scale` times
smaller, and so is everything in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.replay.baselines import BASELINES, CHUNK, Baseline
from benchmarks.replay.clock import HARDWARE, Clock
from benchmarks.replay.engine import ReplayFailed, play_on_engine
from benchmarks.replay.geometries import CONTEXT_TOKENS, GEOMETRIES, Geometry
from benchmarks.replay.play import Play
from benchmarks.replay.requests import Workload
from benchmarks.replay.result import Result, to_json
from sglang_jenga.plan.planner import MAX_LARGE_PAGE_BYTES

CLOCK_CONSTANTS = Clock._fields[2:]


def replay(
    geometry: Geometry,
    workload: Workload,
    baseline: Baseline,
    *,
    pool_bytes: int,
    clock: Clock,
    page_size: int = 1,
    max_running: int = 256,
    chunk: int = CHUNK,
    seconds: float = 1800,
    known_lengths: bool = True,
    arguments: dict[str, Any] | None = None,
) -> Result:
    """Serve `workload`; start an engine before and stop it afterwards.

    Args:
        pool_bytes: of the real model, for KV and states together.
        known_lengths: admission sets room aside for whole answers, as in SGLang's own benchmarks
            (``ignore_eos``); otherwise for a share of them that it adapts, as when serving.
        arguments: further server arguments, which win over the baseline's.

    Raises:
        ValueError: the baseline cannot be had on this geometry (see `missing_on`).
        ReplayFailed: the server refused, died, got stuck or took longer than `seconds`.
    """
    missing = baseline.missing_on(geometry)
    if missing is not None:
        raise ValueError(f"{baseline.name} on {geometry.name}: {missing}")
    if workload.shows_images and not geometry.real.encoder:
        raise ValueError(f"{workload.name}: {geometry.name} sees no images")
    if workload.longest_tokens() >= CONTEXT_TOKENS:
        raise ValueError(f"{workload.name}: requests must be shorter than {CONTEXT_TOKENS} tokens")
    server = {
        "page_size": page_size,
        "max_running_requests": max_running,
        **baseline.server(geometry, chunk),
        **(arguments or {}),
    }
    play = _sweep if baseline.settings(geometry) else _play
    return play(geometry, workload, baseline, pool_bytes, clock, known_lengths, seconds, server)


def _sweep(
    geometry: Geometry,
    workload: Workload,
    baseline: Baseline,
    pool_bytes: int,
    clock: Clock,
    known_lengths: bool,
    seconds: float,
    server: dict[str, Any],
) -> Result:
    """The best of several settings by modelled throughput; all of them stay in the result."""
    points: list[dict[str, Any]] = []
    best: Result | None = None
    for setting in baseline.settings(geometry):
        tried = server | setting
        try:
            found = _play(
                geometry, workload, baseline, pool_bytes, clock, known_lengths, seconds, tried
            )
        except ReplayFailed as error:
            points.append({"setting": setting, "failed": str(error).splitlines()[0]})
            continue
        points.append({"setting": setting, **found.totals})
        if best is None or _speed(found) > _speed(best):
            best = found
    if best is None:
        raise ReplayFailed(f"{geometry.name}: no setting serves this workload: {points}")
    return best._replace(config=best.config | {"sweep": points})


def _speed(result: Result) -> float:
    return result.totals["modelled_tokens_per_s"]


def _play(
    geometry: Geometry,
    workload: Workload,
    baseline: Baseline,
    pool_bytes: int,
    clock: Clock,
    known_lengths: bool,
    seconds: float,
    server: dict[str, Any],
) -> Result:
    play = Play(
        workload.requests,
        clock,
        geometry.weights,
        geometry.real.groups,
        geometry.replayed,
        pool_bytes // geometry.scale,
        known_lengths,
        baseline.plan,
        MAX_LARGE_PAGE_BYTES // geometry.scale,
    )
    started = time.perf_counter()
    outcome = play_on_engine(geometry, play, server, baseline.env, seconds)
    config = {
        "command": " ".join(sys.argv),
        "sglang": version("sglang"),
        "python": platform.python_version(),
        "geometry": geometry.name,
        "stock_stores": geometry.stock,
        "workload": workload.name,
        "described": workload.described,
        "baseline": baseline.name,
        "baseline_described": baseline.described,
        "server": server,
        "env": baseline.env,
        "pool_bytes": pool_bytes,
        "scale": geometry.scale,
        "replayed_pool_bytes": play.pool_bytes,
        "pool": outcome.pool,
        "known_lengths": known_lengths,
        "clock": clock._asdict(),
    }
    totals = outcome.totals | {"host_seconds": time.perf_counter() - started}
    return Result(outcome.steps, outcome.served, totals, config)


def main(argv: list[str] | None = None) -> int:
    from benchmarks.replay import workloads

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", required=True, choices=[*GEOMETRIES])
    parser.add_argument("--workload", required=True, choices=[*workloads.WORKLOADS])
    parser.add_argument("--baseline", required=True, choices=[*BASELINES])
    parser.add_argument("--pool-gib", type=float, help="of KV and states; default: what is left")
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--seconds", type=float, default=1800, help="of this machine, at most")
    parser.add_argument(
        "--unknown-lengths",
        action="store_true",
        help="admission guesses how much of an answer to set room aside for, as when serving",
    )
    parser.add_argument("--json", type=Path)
    add_clock_options(parser)
    options = parser.parse_args(argv)
    geometry = GEOMETRIES[options.geometry]
    clock = clock_of(options, geometry)
    pool_bytes = (
        int(options.pool_gib * 2**30) if options.pool_gib else room_for_pool(geometry, clock)
    )
    try:
        result = replay(
            geometry,
            workloads.WORKLOADS[options.workload](),
            BASELINES[options.baseline],
            pool_bytes=pool_bytes,
            clock=clock,
            page_size=options.page_size,
            max_running=options.max_running,
            chunk=options.chunk,
            seconds=options.seconds,
            known_lengths=not options.unknown_lengths,
        )
    except (ReplayFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(to_json(result)))
    print(result.config["described"])
    print(result.config["pool"])
    for name, value in result.totals.items():
        print(f"{name:30} {value:14,.3f}")
    return 0


def add_clock_options(parser: argparse.ArgumentParser) -> None:
    defaults = Clock()
    parser.add_argument("--hardware", choices=[*HARDWARE], default=defaults.hardware)
    parser.add_argument("--gpus", type=int, help="default: the fewest that hold the model")
    for name in CLOCK_CONSTANTS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=getattr(defaults, name))


def clock_of(options: argparse.Namespace, geometry: Geometry) -> Clock:
    return Clock(
        options.hardware,
        options.gpus or geometry.gpus,
        *(getattr(options, name) for name in CLOCK_CONSTANTS),
    )


def room_for_pool(geometry: Geometry, clock: Clock, *, share: float = 0.88) -> int:
    """Bytes left for the pool when `share` of the GPUs' memory is for weights and pool.

    0.88 is about what SGLang chooses for --mem-fraction-static on one GPU of 80 GB.
    """
    memory = HARDWARE[clock.hardware].memory_bytes * clock.gpus
    left = int(memory * share - geometry.weights.total_bytes)
    if left <= 0:
        raise ValueError(f"{geometry.name} does not fit on {clock.gpus} x {clock.hardware}")
    return left


if __name__ == "__main__":
    sys.exit(main())
