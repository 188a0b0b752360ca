"""Markdown tables of bounds, and of what replays have reached of them. Nothing here runs anything.

A share is modelled tokens per second over a bound's; means are geometric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.replay.ideal_scheduler import Found, Rule
from benchmarks.replay.tables import DASH, geometric_mean, markdown


class Bounds(NamedTuple):
    """Of one cell under one rule; `bounds.py` says what they are."""

    lru: Found
    clairvoyant: Found
    endless: Found

    @property
    def best(self) -> Found:
        return max(self, key=lambda found: found.tokens_per_s)


class Row(NamedTuple):
    """`played`: by baseline, the rule it was played by and its result's totals."""

    model: str
    workload: str
    by_rule: Mapping[Rule, Bounds]
    played: Mapping[str, tuple[Rule, Mapping[str, float]]]

    def shares(self, baseline: str) -> list[float] | None:
        """Of lru, clairvoyant, endless and the best of them, under its own rule."""
        if baseline not in self.played:
            return None
        rule, totals = self.played[baseline]
        found = self.by_rule[rule]
        speed = totals["modelled_tokens_per_s"]
        return [speed / bound.tokens_per_s for bound in (*found, found.best)]


def report(rows: Sequence[Row], dense: Sequence[str], chunk: int) -> str:
    """All tables. `dense` models come last and enter no mean; `chunk` is of the unmixed rule."""
    mixes = [row for row in rows if row.model not in dense]
    control = [row for row in rows if row.model in dense]
    rules = list(dict.fromkeys(rule for row in (*mixes, *control) for rule in row.by_rule))
    parts = [bound_table(mixes, control, rules)]
    played = _baselines(rows)
    if played:
        parts.append(mean_table(mixes, control, played))
        parts.append(limit_table([*mixes, *control], played[-1]))
    return "\n\n".join(parts)


def _baselines(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.played))


def _named(rule: Rule) -> str:
    return f"chunks of {rule.chunk:,}{', mixed' if rule.mixed else ''}"


def bound_table(mixes: Sequence[Row], control: Sequence[Row], rules: Sequence[Rule]) -> str:
    """Tokens per second, and what share of the three bounds each baseline has reached."""
    played = _baselines([*mixes, *control])
    header = [
        "model",
        "load",
        *(f"~tokens/s, {_named(rule)}: lru / clairvoyant / endless" for rule in rules),
        *(f"{name}, of these" for name in played),
    ]
    lines = [_line(row, rules, played) for row in mixes]
    for name, rows in (("**mean**", mixes), ("**mean, dense**", control)):
        if rows and played:
            means = [f"**{_mean(rows, baseline)}**" for baseline in played]
            lines.append([name, f"{len(rows)} cells", *("" for _ in rules), *means])
        if rows is mixes:
            lines += [_line(row, rules, played) for row in control]
    return markdown(header, lines)


def _line(row: Row, rules: Sequence[Rule], played: Sequence[str]) -> list[str]:
    speeds = [
        " / ".join(f"{found.tokens_per_s:,.0f}" for found in row.by_rule[rule])
        if rule in row.by_rule
        else DASH
        for rule in rules
    ]
    shares = [row.shares(baseline) for baseline in played]
    return [row.model, row.workload, *speeds, *(_shown(share) for share in shares)]


def _shown(shares: Sequence[float] | None) -> str:
    return DASH if shares is None else " / ".join(f"{share:.2f}" for share in shares[:3])


def _means(rows: Iterable[Row], baseline: str) -> list[float] | None:
    found = [shares for row in rows if (shares := row.shares(baseline)) is not None]
    return [geometric_mean(column) for column in zip(*found, strict=True)] if found else None


def _mean(rows: Iterable[Row], baseline: str) -> str:
    return _shown(_means(rows, baseline))


def mean_table(mixes: Sequence[Row], control: Sequence[Row], played: Sequence[str]) -> str:
    """Mean shares of the best of the three bounds, per model and per load."""
    lines = []
    for field in ("model", "workload"):
        for name in dict.fromkeys(getattr(row, field) for row in mixes):
            same = [row for row in mixes if getattr(row, field) == name]
            lines.append([name, *_best(same, played)])
    lines.append(["**all**", *(f"**{share}**" for share in _best(mixes, played))])
    if control:
        lines.append(["dense", *_best(control, played)])
    return markdown(["mean share of the best bound", *played], lines)


def _best(rows: Sequence[Row], played: Sequence[str]) -> list[str]:
    found = [_means(rows, baseline) for baseline in played]
    return [DASH if means is None else f"{means[3]:.2f}" for means in found]


def limit_table(rows: Sequence[Row], baseline: str) -> str:
    """What a run lacks, hits or running requests; least share of the best bound first."""
    header = [
        "model",
        "load",
        f"{baseline}, of the best bound",
        f"decoding: {baseline} / lru / clairvoyant / endless",
        "hit tokens, thousands: the same",
    ]
    order = sorted(
        (shares[3], place)
        for place, row in enumerate(rows)
        if (shares := row.shares(baseline)) is not None
    )
    lines = []
    for share, place in order:
        row = rows[place]
        rule, totals = row.played[baseline]
        found: Any = row.by_rule[rule]
        running = [totals["mean_running_per_decode_step"], *(bound.running for bound in found)]
        hits = [totals["hit_tokens"], *(bound.hit_tokens for bound in found)]
        lines.append(
            [
                row.model,
                row.workload,
                f"{share:.2f}",
                " / ".join(f"{count:.1f}" for count in running),
                " / ".join(f"{count / 1000:,.0f}" for count in hits),
            ]
        )
    return markdown(header, lines)
