"""What came of multi-turn chats: latency, cached tokens and goodput, per round and in total.

Plain data first (`report`), then the tables made from it, so that a JSON file says all that was
printed. Judges nothing and knows of no server; a ratio is always the second server's number over
the first one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.chats.load import Load, Player, Turn

COLOURS = ("#d55e00", "#0072b2")
"""Of the servers compared, two at most."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Times are in seconds, None where nothing was measured; `goodput` in tokens per second."""

    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    hit_rate: float | None
    ttft_median: float | None
    ttft_p99: float | None
    itl_median: float | None
    itl_p99: float | None
    in_slo: int
    goodput: float | None


PANELS = (
    ("TTFT, median, ms", "ttft_median", 1e3),
    ("ITL, median, ms", "itl_median", 1e3),
    ("cached, % of the prompt", "hit_rate", 100.0),
)
# What is compared between two servers; the rest are counts that the load fixes.
COMPARED = ("cached_tokens", "ttft_median", "ttft_p99", "itl_median", "itl_p99", "goodput")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value that `percent` % of `values` do not exceed, interpolated between neighbours."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def summarize(turns: Sequence[Turn], slo_ttft: float, seconds: float | None = None) -> Summary:
    """Numbers of `turns`, which took `seconds` together (None: unknown, no goodput).

    Failed requests count as requests and nowhere else. Goodput counts the output tokens of those
    whose first token came within `slo_ttft`; `seconds` include the clients' think time.
    """
    done = [turn for turn in turns if turn.error is None]
    prompt, cached = (
        sum(getattr(turn, name) for turn in done) for name in ("prompt_tokens", "cached_tokens")
    )
    ttfts = [turn.ttft for turn in done]
    gaps = [gap for turn in done for gap in turn.gaps]
    in_slo = [turn for turn in done if turn.ttft <= slo_ttft]
    return Summary(
        requests=len(turns),
        failed=len(turns) - len(done),
        prompt_tokens=prompt,
        cached_tokens=cached,
        hit_rate=ratio(cached, prompt),
        ttft_median=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        itl_median=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        in_slo=len(in_slo),
        goodput=ratio(sum(len(turn.output_ids) for turn in in_slo), seconds),
    )


def by_round(turns: Iterable[Turn], rounds: int, slo_ttft: float) -> list[Summary]:
    """One summary per round, empty rounds included."""
    grouped: list[list[Turn]] = [[] for _ in range(rounds)]
    for turn in turns:
        grouped[turn.round].append(turn)
    return [summarize(group, slo_ttft) for group in grouped]


def identical(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many requests got the same tokens from both servers."""

    def answers(turns: Sequence[Turn]) -> dict[tuple[int, int, int], list[int]]:
        done = (turn for turn in turns if turn.error is None)
        return {(turn.client, turn.branch, turn.round): turn.output_ids for turn in done}

    theirs = answers(other)
    return sum(theirs.get(place) == ids for place, ids in answers(one).items())


def report(players: Sequence[Player], load: Load, slo_ttft: float) -> dict:
    """Everything as plain data; two players are compared, the second over the first.

    Keys: ``load``, ``slo_ttft`` and, by player, ``servers`` with ``seconds`` of play, ``total`` and
    ``rounds`` as in `Summary`, and ``turns`` as in `Turn` without their tokens and gaps; of two
    players also ``ratio`` by the names in `COMPARED` and ``identical``.
    """
    servers = {}
    for player in players:
        rounds = by_round(player.turns, load.rounds, slo_ttft)
        turns = [asdict(turn) for turn in player.turns]
        for turn in turns:
            del turn["gaps"], turn["output_ids"]  # thousands of numbers; the summaries have them
        servers[player.name] = {
            "seconds": player.seconds,
            "total": asdict(summarize(player.turns, slo_ttft, player.seconds)),
            "rounds": [asdict(summary) for summary in rounds],
            "turns": turns,
        }
    result = {"load": asdict(load), "slo_ttft": slo_ttft, "servers": servers}
    if len(players) == 2:
        base, other = (servers[player.name]["total"] for player in players)
        result["ratio"] = {name: ratio(other[name], base[name]) for name in COMPARED}
        result["identical"] = identical(*(player.turns for player in players))
    return result


def _cell(value: float | None, scale: float = 1.0, form: str = ",.1f", unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def _times(numbers: dict) -> list[str]:
    names = ("ttft_median", "ttft_p99", "itl_median", "itl_p99")
    return [_cell(numbers[name], 1e3) for name in names]


def _hits(numbers: dict) -> list[str]:
    cached, prompt = numbers["cached_tokens"], numbers["prompt_tokens"]
    return [f"{cached:,} / {prompt:,}", _cell(numbers["hit_rate"], 100, ".1f", " %")]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right; a line under the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def round_table(rounds: Sequence[dict]) -> str:
    """The `rounds` of one server of a report, a line each."""
    heading = ("round", "requests", "TTFT ms", "p99", "ITL ms", "p99", "cached / prompt", "hit")
    rows = [heading]
    for index, numbers in enumerate(rounds, 1):
        count = str(numbers["requests"])
        rows.append((str(index), count, *_times(numbers), *_hits(numbers)))
    return _aligned(rows)


def total_table(result: dict) -> str:
    """A report's servers, a line each, and what they are of each other."""
    slo = f"goodput (TTFT <= {result['slo_ttft']:g} s)"
    heading = ("", "TTFT ms", "p99", "ITL ms", "p99", "cached / prompt", "hit", slo, "failed")
    rows = [heading]
    for name, server in result["servers"].items():
        total = server["total"]
        goodput = _cell(total["goodput"], unit=" tokens/s")
        rows.append((name, *_times(total), *_hits(total), goodput, str(total["failed"])))
    if "ratio" in result:
        shown = {
            name: _cell(value, form=".2f", unit="x") for name, value in result["ratio"].items()
        }
        cached, *latencies, goodput = (shown[name] for name in COMPARED)
        base, other = result["servers"]
        rows.append((f"{other} / {base}", *latencies, cached, "", goodput, ""))
    return _aligned(rows)


def plot(result: dict) -> str:
    """A report over its rounds as SVG: a panel per quantity, a line per server."""
    from benchmarks.charts import Panel, draw  # matplotlib: playing chats needs none

    panels = []
    for title, name, scale in PANELS:
        lines = {}
        for server, measured in result["servers"].items():
            values = enumerate((numbers[name] for numbers in measured["rounds"]), 1)
            lines[server] = [(at, value * scale) for at, value in values if value is not None]
        panels.append(Panel(title, lines, x_label="round"))
    return draw(panels, dict(zip(result["servers"], COLOURS, strict=False)))
