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
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.engines import Run
from sglang_jenga.testing.families import FAMILY_ARGUMENTS, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many
from tests.servers.parity import model_of
from tests.servers.ranks import COMPARED, PRESSED, same, serve, traces


class Feature(NamedTuple):
    flags: str
    arguments: dict[str, Any]
    reference: dict[str, Any]  # of stock
    names: tuple[str, ...] = ()  # of ranks in the log, whose pages must be the same


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
LAYERS = {
    "llama": "full",
    "qwen3": "full",
    "gemma3_text": "full, window",
    "gemma4": "full, window",
    "qwen3_next": "full, state (GDN)",
    "qwen3_5": "full, state (GDN)",
    "nemotron_h": "full, state (Mamba-2)",
}
ROWS: dict[str, list[tuple[Feature, str]]] = {
    "tp": [(TP, family) for family in ("llama", "gemma3_text", "qwen3_next")],
    "dp": [(DP, "gemma3_text"), (GROUPS, "qwen3"), (GROUPS, "qwen3_next")],
    "pp": [(PP, family) for family in ("llama", "gemma4", "qwen3_5", "nemotron_h")]
    + [(BOTH, "llama")],
}


def measure(feature: Feature, family: str, folder: Path) -> str:
    def served(**arguments: Any) -> Run:
        common = FAMILY_ARGUMENTS.get(family, {})
        return serve(model_of(family, folder), env=COMPARED, **(common | arguments))

    spare = {"max_total_tokens": 8192} | FULL_KV.get(family, {}) | feature.reference
    pressed = PRESSED[family] | {"memory_backend": "jenga", "prepare": admit_too_many}
    stock, one = served(**spare), served(**pressed)
    several = served(**pressed, **feature.arguments)
    asked = list(zip(_flat(stock), _flat(several), strict=True))
    told = [traces(several.log, int(name[-1]), named=name[:-1]) for name in feature.names]
    pages = ("the same" if same(*told) else "**others**") if told else "-"
    return (
        f"| `{feature.flags}` | {family}: {LAYERS[family]} | {sum(a == b for a, b in asked)} of "
        f"{len(asked)} | {one.retractions} / {several.retractions} | {_hits(one):,} / "
        f"{_hits(several):,} | {pages} |"
    )


def _flat(run: Run) -> list[list[int]]:
    return [answer for wave in run.outputs for answer in wave]


def _hits(run: Run) -> int:
    return sum(map(sum, run.cached))


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
