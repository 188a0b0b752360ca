"""`sglang-jenga plan`: what a pool would look like for a model, before any server runs.

Reads config.json alone; imports neither torch nor SGLang. Exit 0 with a plan, or with the reason
why the server does not take the model; errors are one line on stderr, exit 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sglang_jenga import __version__
from sglang_jenga.layers import registry
from sglang_jenga.plan import true_windows
from sglang_jenga.plan.hf_config import ConfigLayers, read_geometry
from sglang_jenga.plan.kv_format import KV_CACHE_DTYPES, MODEL_DTYPES
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.report import DEFAULT_LENGTHS, CapacityRow, capacity_rows, format_plan
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.plan.state_sizes import with_slots

LENGTH_UNITS = {"k": 1 << 10, "m": 1 << 20}
MOST_GIB = 1 << 20
"""The largest pool to plan, in GiB: no rank has more than a part of it."""
_READER_GONE = 141  # as a shell reports a program whose reader has left
_EXAMPLES = """examples:
  sglang-jenga plan tests/configs/gemma-3-27b.json
  sglang-jenga plan /models/gemma-3-27b-it --tp 2 --pool-gib 60 --lengths 4k,32k,128k
"""
_PLAN_EXAMPLES = """examples:
  a folder with a config.json, or the file itself:
    sglang-jenga plan /models/gemma-3-27b-it
  one of two ranks with 60 GiB each, FP8 KV, requests of two lengths:
    sglang-jenga plan config.json --tp 2 --pool-gib 60 --kv-cache-dtype fp8_e4m3 --lengths 4k,32k
  for programs:
    sglang-jenga plan config.json --json
"""


class OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        registry.load_installed()
        text = _plan(args)
    except (OSError, OverflowError, ValueError) as error:
        print(f"sglang-jenga: {_one_line(error)}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would complain once more when it closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    return 0


def _plan(args: argparse.Namespace) -> str:
    config, quantisation = _read_model(args.model)
    geometry = read_geometry(
        config,
        page_size=args.page_size,
        tp=args.tp,
        kv_cache_dtype=args.kv_cache_dtype,
        dtype=args.dtype,
        quantisation=quantisation,
        true_windows=args.jenga_true_windows,
    )
    pool_bytes = int(args.pool_gib * 2**30)
    head = f"{geometry.architecture}, page size {args.page_size}, one of {args.tp} rank(s)"
    if geometry.refused:
        if args.json:
            return json.dumps(_refusal_as_json(geometry), indent=2)
        return f"{head}\nserved: no, {geometry.refused}"

    plan = plan_pool(with_slots(geometry.groups, pool_bytes), pool_bytes)
    lengths, notes = _possible_lengths(args.lengths, geometry.context_tokens)
    rows = capacity_rows(
        plan,
        lengths,
        stock=geometry.stock,
        stock_bytes=pool_bytes,
        states=geometry.states,
        encoder=geometry.encoder,
    )
    notes = (*geometry.notes, *_load_notes(geometry), *notes)
    if args.json:
        return json.dumps(_as_json(geometry, plan, rows, notes), indent=2)
    text = format_plan(plan, rows, stock_summary=geometry.stock_summary, notes=notes)
    return f"{head}\nserved: yes\n{text}"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="sglang-jenga",
        description="JENGA memory for SGLang: plan a pool before any server runs.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"sglang-jenga {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    plan = commands.add_parser(
        "plan",
        help="show large and small pages, and what a pool holds",
        description="Show large and small pages, and how many requests a pool holds, from a "
        "model's config.json alone.",
        epilog=_PLAN_EXAMPLES,
    )
    plan.add_argument("model", type=Path, metavar="MODEL", help="config.json or its folder")
    plan.add_argument("--page-size", type=_count, default=1, help="tokens per page (default 1)")
    plan.add_argument("--tp", type=_count, default=1, help="tensor-parallel ranks (default 1)")
    plan.add_argument(
        "--kv-cache-dtype", default="auto", help=f"one of {', '.join(KV_CACHE_DTYPES)}"
    )
    plan.add_argument("--dtype", default="auto", help=f"one of {', '.join(MODEL_DTYPES)}")
    plan.add_argument("--pool-gib", type=_gib, default=40.0, help="GiB on one rank (default 40)")
    plan.add_argument(
        "--lengths",
        type=_lengths,
        default=DEFAULT_LENGTHS,
        metavar="1k,8k,32k",
        help="tokens per request to count for",
    )
    plan.add_argument(
        true_windows.FLAG,
        action="store_true",
        help="as the server's flag: windows as in Transformers",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size <= MOST_GIB:  # NaN is neither
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and at most {MOST_GIB}, got {text!r}"
        )
    return size


def _lengths(text: str) -> tuple[int, ...]:
    lengths = []
    for word in text.lower().split(","):
        number, unit = (word[:-1], word[-1]) if word[-1:] in LENGTH_UNITS else (word, "")
        if not re.fullmatch("[0-9]{1,12}", number) or int(number) == 0:
            raise argparse.ArgumentTypeError(f"lengths must look like 1k,8k,32k, got {text!r}")
        lengths.append(int(number) * LENGTH_UNITS.get(unit, 1))
    return tuple(lengths)


def _possible_lengths(
    asked: Sequence[int], context: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The lengths that a request can have, and what to say of the others."""
    if context is None or max(asked) <= context:
        return tuple(asked), ()
    possible = tuple(length for length in asked if length <= context) or (context,)
    return possible, (f"no request is longer than the model's context of {context} tokens",)


def _read_model(model: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The parsed config.json, and hf_quant_config.json where it lies beside it."""
    path = model / "config.json" if model.is_dir() else model
    if not path.is_file():
        if not model.exists() and re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(model)):
            raise FileNotFoundError(
                f"no config.json at {model}; if that is a model of the Hugging Face Hub, fetch its "
                f"config first: hf download {model} --include '*config.json' --local-dir FOLDER; "
                "then: sglang-jenga plan FOLDER"
            )
        raise FileNotFoundError(f"no config.json at {model}")
    quantisation = path.with_name("hf_quant_config.json")
    return _read_object(path), _read_object(quantisation) if quantisation.is_file() else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(
                "it begins with a byte order mark, at which Transformers stops too; save it as "
                "UTF-8 without one"
            )
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load_notes(geometry: ConfigLayers) -> tuple[str, ...]:
    if not geometry.states:
        return ()
    return (f"each running request pins {geometry.states} state slot(s)",)


def _refusal_as_json(geometry: ConfigLayers) -> dict[str, Any]:
    return {"architecture": geometry.architecture, "served": False, "refused": geometry.refused}


def _as_json(
    geometry: ConfigLayers, plan: PoolPlan, rows: Sequence[CapacityRow], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "architecture": geometry.architecture,
        "served": True,
        "pool_bytes": plan.pool_bytes,
        "large_page_bytes": plan.large_page_bytes,
        "num_large": plan.num_large,
        "null_smalls": plan.null_smalls,
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
        "stock": geometry.stock_summary,
        "notes": list(notes),
    }


if __name__ == "__main__":
    sys.exit(main())
