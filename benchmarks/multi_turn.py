"""Live multi-turn chats against running servers: latency, cached tokens and goodput per round.

    python -m benchmarks.multi_turn --base-url http://127.0.0.1:30000
    python -m benchmarks.multi_turn --ab                        # tiny model, two servers, a ratio
    python -m benchmarks.multi_turn --ab --model-path MODEL --plot rounds.svg

`--ab` starts stock SGLang and jenga with the same `--max-total-tokens`, which gives jenga the bytes
that so many tokens take in stock, and lets them play the load (`chat_load.py`) round by round in
turn, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import requests

from benchmarks import plotting
from benchmarks.chats.load import Load, Player, play
from benchmarks.chats.report import plot, report, round_table, total_table
from benchmarks.demo import MODEL_CACHE, MODELS, WINDOW, has_gpu, stop_signals
from sglang_jenga.testing.servers import Server, ServerFailed
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.warm import WarmLauncher

BACKENDS = ("stock", "jenga")


def pool_tokens(load: Load) -> int:
    """Half of what all conversations hold in the end, so that the cache has to choose."""
    return max(load.final_tokens() // 2, load.longest_tokens() + load.turn_tokens())


def server_flags(backend: str, load: Load, tokens: int, *, gpu: bool) -> list[str]:
    flags = ["--max-total-tokens", str(tokens)]
    flags += ["--max-running-requests", str(load.clients * load.branching)]
    if gpu:
        flags += ["--mem-fraction-static", "0.4"]  # two servers share the GPU
    if backend == "jenga":
        flags += ["--memory-backend", "jenga"]
    return flags


def compare(
    load: Load, options: argparse.Namespace, launcher: WarmLauncher | None = None
) -> list[Player]:
    """Start stock and jenga on equal KV bytes and play the load on both.

    Raises ServerFailed if one does not start or dies while it plays.
    """
    gpu = has_gpu() and not options.cpu
    tokens = options.max_total_tokens or pool_tokens(load)
    print(f"both servers get --max-total-tokens {tokens}", file=sys.stderr)
    model = options.model_path
    if model is None:
        tiny, dtype = MODELS[0], "bfloat16" if gpu else "float32"
        folder = MODEL_CACHE / f"{tiny.family}-{dtype}"
        model = write_tiny_model(
            tiny.family, folder, num_layers=tiny.num_layers, window=WINDOW, dtype=dtype
        )
    with ExitStack() as stack:
        servers, players = [], []
        for backend in BACKENDS:
            print(f"starting the {backend} server", file=sys.stderr)
            flags = server_flags(backend, load, tokens, gpu=gpu)
            flags += shlex.split(options.server_args)  # last: SGLang takes the last of a name
            server = stack.enter_context(Server(model, *flags, gpu=gpu, launcher=launcher))
            # First requests load kernels; nothing of them may stay in the cache.
            server.generate([load.tokens(load.longest_tokens() // 2, "warm-up")], 4)
            server.flush_cache()
            servers.append(server)
            players.append(Player(backend, server.url, load))
        asyncio.run(play(players, load))
        for player, server in zip(players, servers, strict=True):
            if not server.alive():
                raise ServerFailed(f"the {player.name} server died\n{server.log(60)}")
    return players


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.multi_turn", description=__doc__.split("\n\n")[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", help="a running server")
    where.add_argument("--ab", action="store_true", help="start stock and jenga and compare them")
    load = parser.add_argument_group("load")
    default = Load()
    for name, text in (
        ("rounds", "messages of a conversation"),
        ("clients", "conversations at a time"),
        ("branching", "branches that a conversation parts in"),
        ("branch-at", "rounds before it parts (default: a third of them)"),
        ("system-tokens", "length of the system prompt that all share"),
        ("message-tokens", "length of a message"),
        ("answer-tokens", "length of an answer"),
        ("vocab-size", "token ids are drawn below this"),
        ("seed", "of all texts; a server that played it before has them cached"),
    ):
        value = None if name == "branch-at" else getattr(default, name.replace("-", "_"))
        shown = "" if value is None else f" (default: {value})"
        load.add_argument(f"--{name}", type=int, default=value, metavar="N", help=text + shown)
    load.add_argument(
        "--think-time",
        type=float,
        default=default.think_time,
        metavar="S",
        help=f"mean seconds before a message, exponential (default: {default.think_time})",
    )
    parser.add_argument("--slo-ttft", type=float, default=1.0, metavar="S", help="for goodput")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG of the rounds")
    servers = parser.add_argument_group("with --ab")
    servers.add_argument("--model-path", help="default: a tiny random-weight Gemma-3")
    servers.add_argument("--cpu", action="store_true", help="CPU engine even if there is a GPU")
    servers.add_argument(
        "--max-total-tokens", type=int, metavar="N", help="default: half of all tokens of the load"
    )
    servers.add_argument("--server-args", default="", metavar="'...'", help="more, for both")
    options = parser.parse_args(argv)
    for name in ("rounds", "clients", "branching", "message_tokens", "answer_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.plot and (missing := plotting.missing()):
        parser.error(f"--plot: {missing}")
    return options


def load_of(options: argparse.Namespace) -> Load:
    if options.branch_at is None:
        options.branch_at = options.rounds // 3
    return Load(**{name: getattr(options, name) for name in Load.__slots__})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    load = load_of(options)
    try:
        with stop_signals():
            if options.ab:
                players = compare(load, options)
            else:
                players = [Player("server", options.base_url, load)]
                asyncio.run(play(players, load))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ServerFailed, requests.RequestException) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    result = report(players, load, options.slo_ttft)
    for name, server in result["servers"].items():
        print(f"\n{name}\n{round_table(server['rounds'])}")
    print(f"\n{total_table(result)}")
    if "identical" in result:
        print(f"\n{result['identical']} of {load.turns()} answers have the same tokens")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(plot(result))
    errors = [turn.error for player in players for turn in player.turns if turn.error]
    if errors:
        print(f"\n{len(errors)} requests failed; the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
