"""What is possible at best on the same bytes and the same clock, so that a replay is a share of it.

    python -m benchmarks.replay.bounds --profile full --trace conversation_trace.jsonl \\
        --models gemma-3-27b --workloads tenants --json results

A small simulator (`ideal_scheduler.py`) serves the requests first come, first served, from ideal
memory (`ideal_memory.py`): bytes are counted exactly, without pages, padding or partitions, and
nothing is recomputed. Steps are made by the run's own rule (`rule_of`): prompts in steps of their
own in chunks of 8,192 tokens, or decode steps in chunks of 2,048. Three bounds for each rule:

    lru          what is kept goes by age. The better of two admissions: all that is only kept is
                 free to whoever is admitted, or all but windows and states that running requests
                 have gone on from
    clairvoyant  what is kept goes by next use, furthest first, in the order of admission that `lru`
                 has had. The best of six admissions: these two, and the same with a quarter and
                 half of the pool kept from admission while others run
    endless      memory without end: every token that was computed in an earlier step is hit

The best of the three is the cell's bound. It is one for memory under this scheduler; where a real
run may still pass it, or it is too generous:

* It knows where requests will part, and keeps windows and states there only, at no other tokens of
  a prefix and at none that nobody will come back to. No server knows; this is generous.
* Running requests share what they have in common as soon as it is computed, a request with windows
  needs those of its tokens and no more while it is prefilled, its window is moved ahead of it by
  up to 64 tokens (an eighth of a short one), and who has ended is known in the same step, which
  SGLang learns one step later. Generous, and little.
* Admission promises all that a request will come to need, as SGLang's does where answers' lengths
  are known. Who counts on what others will have freed by then admits more; so does who retracts.
* Age and next use ask nothing about bytes: a state is worth thousands of tokens, and whoever weighs
  what is lost against its bytes can do better than either. Six admissions are not all.
* More running requests or more hits need not be faster: where clients wait for answers, they come
  back together, and prompts that everybody waits for are computed sooner. A bound may so be below
  another one with less memory, and a run above its bound.
* Prompts that are begun in one step do not hit each other's tokens, nor is the queue put into
  another order. Schedulers that do both are not bounded by this.

Nothing is measured but on the same clock that replays are (`clock.py`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.replay.baselines import BASELINES, CHUNK
from benchmarks.replay.bench import build_workloads, cells_of, parser_of_cells
from benchmarks.replay.bounds_tables import Bounds, Row, report
from benchmarks.replay.cells import placed
from benchmarks.replay.geometries import GEOMETRIES, Geometry
from benchmarks.replay.ideal_memory import Policy
from benchmarks.replay.ideal_scheduler import Found, Rule, Server, ranks, serve
from benchmarks.replay.ideal_tree import Tree
from benchmarks.replay.profiles import DENSE, DEPLOYMENTS, PROFILES
from benchmarks.replay.requests import Workload
from sglang_jenga.testing.engines import preload

KEPT_BACK = (0.0, 0.25, 0.5)
PLAYED = ("stock", "jenga-unmixed", "jenga")
"""Baselines whose results are given as shares."""


def rule_of(baseline: str, geometry: Geometry, told: Mapping[str, Any] | None = None) -> Rule:
    """How a server of this baseline makes steps; `told`: its arguments, if it has been played."""
    if told is None:
        told = BASELINES[baseline].server(geometry)
    if "chunked_prefill_size" in told:
        return Rule(told["chunked_prefill_size"], told.get("enable_mixed_chunk", False))
    mixed = BASELINES["stock-mixed"].arguments  # jenga's own choice is the same
    return Rule(mixed["chunked_prefill_size"], mixed["enable_mixed_chunk"])


def bounds(server: Server, workload: Workload, tree: Tree, rule: Rule) -> Bounds:
    """Of one cell under one rule. Raises ValueError if a request or a layer type has no place."""

    def play(policy: Policy, pool_bytes: float = server.pool_bytes) -> Found:
        return serve(server._replace(pool_bytes=pool_bytes), workload.requests, tree, rule, policy)

    shields = (False, True) if len(server.groups) > 1 else (False,)
    lru = max((play(Policy(shield)) for shield in shields), key=_speed)
    order = ranks(lru.order)
    clairvoyant = [play(Policy(shield, keep, order)) for shield in shields for keep in KEPT_BACK]
    return Bounds(lru, max(clairvoyant, key=_speed), play(Policy(), math.inf))


def _speed(found: Found) -> float:
    return found.tokens_per_s


class Cell(NamedTuple):
    """What a row is about."""

    model: str
    workload: Workload
    tree: Tree

    def row(self, folder: Path | None) -> Row:
        geometry = GEOMETRIES[self.model]
        clock, pool_bytes = placed(geometry, DEPLOYMENTS[self.model])
        server = Server(geometry.weights, geometry.real.groups, clock, pool_bytes)
        by_rule: dict[Rule, Bounds] = {}
        for baseline in ("stock", "jenga"):
            rule = rule_of(baseline, geometry)
            if rule not in by_rule:
                by_rule[rule] = bounds(server, self.workload, self.tree, rule)
        played = {}
        for baseline, stored in self._stored(folder):
            config = stored["config"]
            same = (config["pool_bytes"], config["clock"], config["described"]) == (
                pool_bytes,
                clock._asdict(),
                self.workload.described,
            )
            rule = rule_of(baseline, geometry, config["server"])
            if same and rule in by_rule:
                played[baseline] = (rule, stored["totals"])
        return Row(self.model, self.workload.name, by_rule, played)

    def _stored(self, folder: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Results of replays of this cell, by baseline."""
        for baseline in PLAYED if folder else ():
            assert folder is not None
            path = folder / f"{self.model}--{self.workload.name}--{baseline}.json"
            if path.exists():
                stored = json.loads(path.read_text())
                if "result" in stored:
                    yield baseline, stored["result"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of_cells(__doc__)
    parser.add_argument(
        "--json", type=Path, metavar="DIR", help="results of replays to give as shares"
    )
    options = parser.parse_args(argv)
    options.baselines = ["stock"]
    profile = PROFILES[options.profile]
    preload()  # before a workload imports SGLang, which asks for the device once
    try:
        workloads, not_built = build_workloads(options, profile)
        cells = cells_of(options, profile, workloads)
        rows = _rows(cells, workloads, options.json)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report(rows, DENSE, CHUNK))
    for name, why in not_built.items():
        print(f"\n{name}: {why}")
    return 0


def _rows(
    cells: Sequence[Any], workloads: Mapping[str, Workload], folder: Path | None
) -> list[Row]:
    trees: dict[str, Tree] = {}
    rows = []
    for number, cell in enumerate(cells, 1):
        workload = workloads[cell.workload]
        started = time.perf_counter()
        if cell.workload not in trees:
            trees[cell.workload] = Tree(workload.requests)
        rows.append(Cell(cell.model, workload, trees[cell.workload]).row(folder))
        seconds = time.perf_counter() - started
        print(
            f"[{number}/{len(cells)}] {cell.model} / {cell.workload} ({seconds:.1f} s)",
            file=sys.stderr,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
