"""Plays the cells of a table one by one and keeps their results, so that a stopped table goes on.

A cell is a model, a workload and a baseline. Its file carries a fingerprint of all that decides its
numbers but the code: geometry, requests, baseline, pool bytes, clock, limits. A file with another
fingerprint is played again; after a change of code, remove the files. That a baseline does not
boot or gets stuck is a result too, and kept like one; that time ran out is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.replay.baselines import BASELINES
from benchmarks.replay.clock import Clock
from benchmarks.replay.engine import ReplayFailed, TookTooLong
from benchmarks.replay.geometries import GEOMETRIES, Geometry
from benchmarks.replay.requests import Workload
from benchmarks.replay.result import Result, from_json, to_json
from benchmarks.replay.run import CHUNK, replay, room_for_pool

RESULT_VERSION = 3
"""Counts what totals results have: those with others are played again."""


class Cell(NamedTuple):
    model: str
    workload: str
    baseline: str

    def __str__(self) -> str:
        return " / ".join(self)


class Deployment(NamedTuple):
    """The GPUs a model is thought to run on; the pool gets what its weights leave of them, or
    `pool_gib` of that."""

    hardware: str = "h100"
    gpus: int = 1
    pool_gib: float | None = None


class Limits(NamedTuple):
    """`seconds`: of this machine, for one replay; a sweep has as many of them as ratios."""

    page_size: int = 1
    max_running: int = 256
    chunk: int = CHUNK
    seconds: float = 600


def placed(geometry: Geometry, deployment: Deployment) -> tuple[Clock, int]:
    """The clock of these GPUs, and the bytes of the pool on them."""
    clock = Clock(deployment.hardware, deployment.gpus)
    pool_bytes = room_for_pool(geometry, clock)
    if deployment.pool_gib is not None:
        pool_bytes = min(pool_bytes, int(deployment.pool_gib * 2**30))
    return clock, pool_bytes


class Missing(NamedTuple):
    """Why a cell has no result, in one line."""

    why: str


def play(
    cell: Cell,
    workload: Workload,
    deployment: Deployment,
    limits: Limits,
    folder: Path,
    *,
    only_stored: bool = False,
    run: Callable[..., Result] = replay,
) -> Result | Missing:
    """The cell's result, from its file in `folder` if that is still about the same replay."""
    geometry, baseline = GEOMETRIES[cell.model], BASELINES[cell.baseline]
    why = baseline.missing_on(geometry)
    if why is not None:
        return Missing(why)
    clock, pool_bytes = placed(geometry, deployment)
    told = (baseline.server(geometry), baseline.settings(geometry), baseline.env, baseline.plan)
    decisive = limits._replace(seconds=0)
    fingerprint = _fingerprint(workload, geometry, told, clock, pool_bytes, decisive)
    path = folder / ("--".join(cell) + ".json")
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["fingerprint"] == fingerprint:
            return _read(stored)
    if only_stored:
        return Missing("not replayed yet")
    try:
        result = run(
            geometry, workload, baseline, pool_bytes=pool_bytes, clock=clock, **limits._asdict()
        )
        stored = {"fingerprint": fingerprint, "result": to_json(result)}
    except TookTooLong as error:
        return Missing(str(error).splitlines()[0])
    except ReplayFailed as error:
        stored = {"fingerprint": fingerprint, "failed": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    # A reader, or the next start after a kill in between, never sees half a file.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stored))
    part.replace(path)
    return _read(stored)


def _read(stored: dict[str, Any]) -> Result | Missing:
    if "failed" in stored:
        lines = stored["failed"].strip().splitlines()
        return Missing(lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}")
    return from_json(stored["result"])


def _fingerprint(workload: Workload, *decisive: Any) -> str:
    digest = hashlib.sha256(repr((RESULT_VERSION, *decisive)).encode())
    for request in workload.requests:
        digest.update(repr((request.rid, request.at, request.after, request.encoder)).encode())
        digest.update(request.prompt.tobytes())
        digest.update(request.output.tobytes())
    return digest.hexdigest()
