"""`sglang-jenga plan`: what a pool would look like for a model, before any server runs.

Reads config.json alone; imports neither torch nor SGLang. Errors are one line on stderr, exit 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sglang_jenga.plan.hf_config import ModelGeometry, read_geometry
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.report import DEFAULT_LENGTHS, CapacityRow, capacity_rows, format_plan
from sglang_jenga.plan.spec import PoolPlan

LENGTH_UNITS = {"k": 1 << 10, "m": 1 << 20}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        config = _read_config(args.model)
        geometry = read_geometry(
            config, page_size=args.page_size, tp=args.tp, dtype=args.kv_cache_dtype
        )
        pool_bytes = int(args.pool_gib * 2**30)
        plan = plan_pool(geometry.groups, pool_bytes)
    except (OSError, OverflowError, ValueError) as error:
        print(f"sglang-jenga: {error}", file=sys.stderr)
        return 2
    rows = capacity_rows(
        plan,
        args.lengths,
        stock=geometry.stock,
        stock_bytes=pool_bytes,
        states=geometry.states,
    )
    if args.json:
        print(json.dumps(_as_json(geometry, plan, rows), indent=2))
        return 0
    print(f"{geometry.architecture}, page size {args.page_size}, one of {args.tp} rank(s)")
    print(
        format_plan(plan, rows, stock_summary=geometry.stock.summary, notes=_load_notes(geometry))
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="sglang-jenga", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    plan = commands.add_parser("plan", help="show large and small pages, and what a pool holds")
    plan.add_argument("model", type=Path, metavar="MODEL_DIR", help="folder with a config.json")
    plan.add_argument("--page-size", type=int, default=1, help="tokens per page (default 1)")
    plan.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default 1)")
    plan.add_argument("--kv-cache-dtype", default="auto", help="auto, bf16, fp8_e4m3, ...")
    plan.add_argument("--pool-gib", type=float, default=40.0, help="GiB on one rank (default 40)")
    plan.add_argument(
        "--lengths",
        type=_lengths,
        default=DEFAULT_LENGTHS,
        metavar="1k,8k,32k",
        help="tokens per request to count for",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    lengths = []
    for word in text.lower().split(","):
        number, unit = (word[:-1], word[-1]) if word[-1:] in LENGTH_UNITS else (word, "")
        if not number.isdecimal() or int(number) == 0:
            raise argparse.ArgumentTypeError(f"lengths must look like 1k,8k,32k, got {text!r}")
        lengths.append(int(number) * LENGTH_UNITS.get(unit, 1))
    return tuple(lengths)


def _read_config(model: Path) -> dict[str, Any]:
    path = model / "config.json" if model.is_dir() else model
    if not path.is_file():
        raise FileNotFoundError(f"no config.json at {model}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _load_notes(geometry: ModelGeometry) -> tuple[str, ...]:
    notes = geometry.notes
    if geometry.states:
        notes += (f"each running request pins {geometry.states} state slot(s) in SGLang",)
    return notes


def _as_json(
    geometry: ModelGeometry, plan: PoolPlan, rows: Sequence[CapacityRow]
) -> dict[str, Any]:
    return {
        "architecture": geometry.architecture,
        "pool_bytes": plan.pool_bytes,
        "large_page_bytes": plan.large_page_bytes,
        "num_large": plan.num_large,
        "null_smalls": plan.null_smalls,
        "runs_window_as_full": geometry.runs_window_as_full,
        "groups": [
            {
                "label": item.group.label,
                "layer_ids": list(item.group.layer_ids),
                "entry_bytes": item.group.entry_bytes,
                "padded_entry_bytes": item.padded_entry_bytes,
                "tokens_per_page": item.group.tokens_per_page,
                "small_page_bytes": item.small_page_bytes,
                "smalls_per_large": item.smalls_per_large,
                "padding_fraction": item.padding_fraction,
            }
            for item in plan.groups
        ],
        "capacity": [{**row._asdict(), "tokens": row.tokens} for row in rows],
        "stock": geometry.stock.summary,
        "notes": list(_load_notes(geometry)),
    }


if __name__ == "__main__":
    sys.exit(main())
