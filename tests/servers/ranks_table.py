"""What several ranks do, held against one: a table of features x kinds of models.

    python -m tests.servers.ranks_table                    # all rows, some ten minutes
    python -m tests.servers.ranks_table pp                 # rows of one feature

Engines as in `test_ranks` and `test_pipeline`: 16 prompts, then their conversations go on; pools in
which admission of too many makes requests come again. Tokens are held against stock's with memory
to spare: with --tp alone, or in stages, those of as many ranks, since sums of parts are rounded
otherwise than sums of all, else those of one.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FAMILY_ARGUMENTS, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many
from tests.servers.parity import model_of
from tests.servers.ranks import FIRST, go_on, same, traces

COMPARED = EXACT | {"SGLANG_JENGA_COMPARE_RANKS": "1"}


class Feature(NamedTuple):
    flags: str
    arguments: dict[str, Any]
    reference: dict[str, Any]  # of stock
    names: tuple[str, ...] = ()  # of ranks in the log, whose pages must be the same


class Kind(NamedTuple):
    layers: str
    pool: dict[str, Any]


TP = Feature("--tp 2", {"tp_size": 2}, {"tp_size": 2}, ("TP0", "TP1"))
DP = Feature("--dp 2", {"dp_size": 2}, {})
GROUPS = Feature(
    "--tp 2 --dp 2 --enable-dp-attention",
    {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
    {},
)
PP = Feature("--pp-size 2", {"pp_size": 2}, {}, ("PP0", "PP1"))
BOTH = Feature(
    "--pp-size 2 --tp 2",
    {"pp_size": 2, "tp_size": 2},
    {"tp_size": 2},
    ("PP0 TP0", "PP0 TP1", "PP1 TP0", "PP1 TP1"),
)
STATES = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
KINDS = {
    "llama": Kind("full", {"max_total_tokens": 640}),
    "qwen3": Kind("full", {"max_total_tokens": 640}),
    "gemma3_text": Kind("full, window", {"max_total_tokens": 300}),
    "gemma4": Kind("full, window", {"max_total_tokens": 300}),
    "qwen3_next": Kind(
        "full, state (GDN)",
        {
            "max_total_tokens": 400,
            "max_mamba_cache_size": 14,
            "mamba_radix_cache_strategy": "extra_buffer",
        },
    ),
    "qwen3_5": Kind(
        "full, state (GDN)", STATES | {"max_total_tokens": 480, "max_mamba_cache_size": 12}
    ),
    "nemotron_h": Kind(
        "full, state (Mamba-2)", STATES | {"max_total_tokens": 480, "max_mamba_cache_size": 12}
    ),
}
ROWS: dict[str, list[tuple[Feature, str]]] = {
    "tp": [(TP, family) for family in ("llama", "gemma3_text", "qwen3_next")],
    "dp": [(DP, "gemma3_text"), (GROUPS, "qwen3"), (GROUPS, "qwen3_next")],
    "pp": [(PP, family) for family in ("llama", "gemma4", "qwen3_5", "nemotron_h")]
    + [(BOTH, "llama")],
}


def serve(family: str, folder: Path, **arguments: Any) -> Run:
    given = {"max_new_tokens": 24, "chunked_prefill_size": 64, "env": COMPARED}
    given |= FAMILY_ARGUMENTS.get(family, {})
    return run_engine(model_of(family, folder), [FIRST, go_on], **(given | arguments))


def measure(feature: Feature, family: str, folder: Path) -> str:
    kind = KINDS[family]
    spare = {"max_total_tokens": 8192} | FULL_KV.get(family, {}) | feature.reference
    pressed = kind.pool | {"memory_backend": "jenga", "prepare": admit_too_many}
    stock = serve(family, folder, **spare)
    one = serve(family, folder, **pressed)
    several = serve(family, folder, **pressed, **feature.arguments)
    asked = list(zip(_flat(stock), _flat(several), strict=True))
    told = [traces(several, int(name[-1]), named=name[:-1]) for name in feature.names]
    pages = ("the same" if same(*told) else "**others**") if told else "-"
    return (
        f"| `{feature.flags}` | {family}: {kind.layers} | {sum(a == b for a, b in asked)} of "
        f"{len(asked)} | {one.retractions} / {_retractions(several)} | {_hits(one):,} / "
        f"{_hits(several):,} | {pages} |"
    )


def _flat(run: Run) -> list[list[int]]:
    return [answer for wave in run.outputs for answer in wave]


def _hits(run: Run) -> int:
    return sum(map(sum, run.cached))


def _retractions(run: Run) -> int:
    """Of all groups of ranks with requests of their own. Each rank and stage tells; of a group the
    first is counted, which with DP attention has a number of its own for --tp."""
    found = re.findall(r"^\[\S+ \S+(.*?)\].*#retracted_reqs: (\d+)", run.log, re.M)
    others = r"PP[1-9]|(?<!DP[1-9] )TP[1-9]"
    return sum(int(count) for ranks, count in found if not re.search(others, ranks))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="*", choices=[*ROWS, []], help="default: all")
    options = parser.parse_args(argv)
    print("| flags | model | tokens of stock | retractions | prompts' tokens hit | pages |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        for name in options.features or ROWS:
            for feature, family in ROWS[name]:
                print(measure(feature, family, Path(folder)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
