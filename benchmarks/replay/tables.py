"""Markdown tables of finished replays: every cell, the ratios, their averages, what is missing.

Columns under *measured* are facts of the memory managers, exact on any machine; columns with a
`~` come out of the virtual clock's model of a GPU. Host times are this machine's own. Nothing here
runs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, log
from typing import NamedTuple

from benchmarks.replay.cells import Cell, Missing
from benchmarks.replay.facts import Facts
from benchmarks.replay.result import Result

JENGA = "jenga"
RIVALS = ("stock", "stock-best", "max-page", "unified")
DASH = "-"


class Group(NamedTuple):
    """Results by baseline of one model and workload: the side-by-side that ratios are taken of."""

    model: str
    workload: str
    results: Mapping[str, Result]

    def ratio(self, rival: str, total: str = "modelled_tokens_per_s") -> float | None:
        """jenga over `rival`; None if one did not run or the rival has nothing."""
        if JENGA not in self.results or rival not in self.results:
            return None
        theirs = self.results[rival].totals[total]
        return self.results[JENGA].totals[total] / theirs if theirs else None


def groups(results: Mapping[Cell, Result]) -> list[Group]:
    """In the order in which models and workloads first occur."""
    by_place: dict[tuple[str, str], dict[str, Result]] = {}
    for cell, result in results.items():
        by_place.setdefault((cell.model, cell.workload), {})[cell.baseline] = result
    return [Group(*place, found) for place, found in by_place.items()]


def rivals_in(results: Mapping[Cell, Result]) -> list[str]:
    """Rivals that ran anywhere: the others have no column."""
    ran = {cell.baseline for cell in results}
    return [rival for rival in RIVALS if rival in ran]


def geometric_mean(values: Iterable[float]) -> float:
    """Raises ValueError without values or with one that is not positive."""
    logs = [log(value) for value in values]
    if not logs:
        raise ValueError("no values")
    return exp(sum(logs) / len(logs))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}x"


def cell_table(results: Mapping[Cell, Result]) -> str:
    """One row per replay; modelled columns are marked with `~`.

    Running requests: mean over the time in which others waited, mean of decode steps, most. Host:
    the scheduler's thread, per step. With scheduling: if the GPU waits for that thread where it is
    slower than the step before.
    """
    header = [
        "model",
        "workload",
        "baseline",
        "running: waited, decode, peak",
        "hit tokens",
        "recomputed",
        "retracted",
        "wasted",
        "~tokens/s",
        "~with scheduling",
        "~TTFT p50 / p99, s",
        "~ITL p50 / p99, ms",
        "host, ms a step: mean / p99",
        "replayed in, s",
    ]
    rows = []
    for cell, result in results.items():
        total = result.totals
        rows.append(
            [
                *cell,
                f"{total['mean_running']:.1f} / {total['mean_running_per_decode_step']:.1f} / "
                f"{total['peak_running']:.0f}",
                f"{total['hit_tokens']:,.0f}",
                f"{total['recomputed_tokens']:,.0f}",
                f"{total['retractions']:.0f}",
                f"{100 * total['wasted_share']:.2f} %",
                f"{total['modelled_tokens_per_s']:,.0f}",
                f"{total['host_paced_tokens_per_s']:,.0f}",
                f"{total['ttft_p50']:.2f} / {total['ttft_p99']:.2f}",
                f"{1000 * total['itl_p50']:.1f} / {1000 * total['itl_p99']:.1f}",
                f"{total['host_ms_per_step']:.2f} / {total['host_ms_p99']:.1f}",
                f"{total['host_seconds']:.0f}",
            ]
        )
    return markdown(header, rows)


def ratio_table(results: Mapping[Cell, Result], dense: Sequence[str]) -> str:
    """jenga over each rival, a row per model and workload, then geometric means.

    `dense` models are the control: they come last and enter no mean.
    """
    rivals = rivals_in(results)
    header = [
        "model",
        "workload",
        "decoding, stock / jenga",
        "hit tokens, stock / jenga",
        "retracted, stock / jenga",
        "wasted, jenga",
        "host, ms a step, stock / jenga",
        "~with scheduling, over stock",
        *(f"~tokens/s over {rival}" for rival in rivals),
    ]
    found = groups(results)
    hybrid = [group for group in found if group.model not in dense]
    rows = [_ratio_row(group, rivals) for group in hybrid]
    rows.append(_mean_row("geometric mean", hybrid, rivals))
    rows += [_ratio_row(group, rivals) for group in found if group.model in dense]
    return markdown(header, rows)


def _ratio_row(group: Group, rivals: Sequence[str]) -> list[str]:
    def both(total: str, form: str) -> str:
        return " / ".join(
            format(group.results[name].totals[total], form) if name in group.results else DASH
            for name in ("stock", JENGA)
        )

    jenga = group.results.get(JENGA)
    return [
        group.model,
        group.workload,
        both("mean_running_per_decode_step", ".1f"),
        both("hit_tokens", ",.0f"),
        both("retractions", ".0f"),
        f"{100 * jenga.totals['wasted_share']:.2f} %" if jenga else DASH,
        both("host_ms_per_step", ".2f"),
        times(group.ratio("stock", "host_paced_tokens_per_s")),
        *(times(group.ratio(rival)) for rival in rivals),
    ]


def _mean_row(name: str, found: Sequence[Group], rivals: Sequence[str]) -> list[str]:
    decoding = _mean_ratio(found, "stock", "mean_running_per_decode_step")
    return [
        f"**{name}**",
        "",
        f"**{decoding}**",
        "",
        "",
        "",
        f"**{_mean_ratio(found, 'stock', 'host_ms_per_step')}**",
        f"**{_mean_ratio(found, 'stock', 'host_paced_tokens_per_s')}**",
        *(f"**{_mean_ratio(found, rival)}**" for rival in rivals),
    ]


def _mean_ratio(found: Sequence[Group], rival: str, total: str = "modelled_tokens_per_s") -> str:
    """Geometric mean over the groups in which both ran, and how many those are."""
    ratios = [ratio for group in found if (ratio := group.ratio(rival, total)) is not None]
    return f"{geometric_mean(ratios):.2f}x of {len(ratios)}" if ratios else DASH


def means_by(results: Mapping[Cell, Result], dense: Sequence[str], field: str) -> str:
    """Geometric means over the hybrid models, a row per `model` or per `workload`."""
    rivals = rivals_in(results)
    hybrid = [group for group in groups(results) if group.model not in dense]
    keys = list(dict.fromkeys(getattr(group, field) for group in hybrid))
    rows = []
    for key in keys:
        same = [group for group in hybrid if getattr(group, field) == key]
        row = [key]
        for rival in rivals:
            ratios = [ratio for group in same if (ratio := group.ratio(rival)) is not None]
            row.append(
                f"{geometric_mean(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
                if ratios
                else DASH
            )
        rows.append(row)
    return markdown([field, *(f"~tokens/s over {rival}" for rival in rivals)], rows)


def ablation_table(results: Mapping[Cell, Result]) -> str:
    """Each of our policies switched off, over jenga as it is: below 1.00x it is worth having.

    Empty if no ablation was played.
    """
    prefix = f"{JENGA}-no-"
    names = list(
        dict.fromkeys(cell.baseline for cell in results if cell.baseline.startswith(prefix))
    )
    rows = []
    for group in groups(results):
        if JENGA not in group.results or not any(name in group.results for name in names):
            continue
        row = [group.model, group.workload]
        for name in names:
            parts = [
                times(1 / ratio) if (ratio := group.ratio(name, total)) else DASH
                for total in ("modelled_tokens_per_s", "hit_tokens")
            ]
            row.append(" / ".join(parts))
        rows.append(row)
    if not rows:
        return ""
    header = ["model", "workload", *(f"no {name.removeprefix(prefix)}" for name in names)]
    return markdown(header, rows) + "\n\n~tokens/s / hit tokens, over jenga with everything on."


def workload_table(found: Mapping[str, Facts]) -> str:
    header = ["workload", "requests", "prompt tokens", "reusable", "output tokens", "longest"]
    rows = [
        [
            name,
            f"{facts.requests:,}",
            f"{facts.prompt_tokens:,}",
            f"{100 * facts.reusable_share:.1f} %",
            f"{facts.output_tokens:,}",
            f"{facts.longest_tokens:,}",
        ]
        for name, facts in found.items()
    ]
    return markdown(header, rows)


def pool_table(results: Mapping[Cell, Result]) -> str:
    """What each model's pool is, and what stock makes of it."""
    rows = {}
    for cell, result in results.items():
        config = result.config
        clock = config["clock"]
        rows[cell.model] = [
            cell.model,
            f"{clock['gpus']} x {clock['hardware'].upper()}",
            f"{config['pool_bytes'] / 2**30:.1f} GiB",
            f"1 / {config['scale']:,}",
            config["stock_stores"],
        ]
    header = ["model", "GPUs", "pool", "replayed at", "how stock divides it"]
    return markdown(header, rows.values())


def missing_table(missing: Mapping[Cell, Missing], not_built: Mapping[str, str]) -> str:
    """What was not replayed and why, a row per reason; empty if nothing is missing."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for cell, found in missing.items():
        by_reason.setdefault((cell.model, found.why), []).append(f"{cell.workload}/{cell.baseline}")
    rows = [[workload, "", why] for workload, why in not_built.items()]
    rows += [[model, ", ".join(cells), why] for (model, why), cells in by_reason.items()]
    return markdown(["not replayed", "cells", "why"], rows) if rows else ""
