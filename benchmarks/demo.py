"""Play the same multi-turn chats against stock SGLang and against jenga, in the same KV bytes.

    python -m benchmarks.demo          # from the repository's root; `make demo` sets up and runs it
    python -m benchmarks.demo --cpu    # SGLang's CPU engine even if there is a GPU

Tiny random-weight models, real servers over HTTP, one table. Both servers of a model get the same
`--max-total-tokens N`: stock takes N slots of every layer, jenga the bytes that those would take.
What the servers did is read from their logs, one line per decode step.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import requests

from sglang_jenga.testing.servers import Server, ServerFailed
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
MODEL_CACHE = ROOT / ".cache" / "demo"
WINDOW = 32
SEED = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """`chats` clients at a time, `turns` messages each; every system prompt has several chats."""

    chats: int = 16
    turns: int = 4
    system_prompts: int = 4
    system_tokens: int = 200
    # More than WINDOW, so that no two requests look back at the same window tokens.
    message_tokens: tuple[int, int] = (70, 110)
    answer_tokens: int = 32


class Model(NamedTuple):
    title: str
    family: str
    num_layers: int
    max_total_tokens: int


MODELS = (
    Model("Gemma-3-like, 10 window + 2 full layers", "gemma3_text", 12, 1536),
    Model("Llama, 12 full layers", "llama", 12, 1536),
)
BACKENDS = ("stock", "jenga")


class Step(NamedTuple):
    """One decode step: running requests, and the tokens whose slots they hold per layer type.

    `window_tokens` is None where the server stores window layers like full ones.
    """

    running: int
    full_tokens: int
    window_tokens: int | None


class Outcome(NamedTuple):
    """What one server made of the workload. `answers[chat][turn]` are token ids."""

    answers: list[list[list[int]]]
    cached_tokens: int
    retractions: int
    pool_bytes: int
    held_bytes: int
    needed_bytes: int
    concurrent: int


class Layers(NamedTuple):
    """Layer counts of a model and the KV bytes of one token in one layer."""

    full: int
    window: int
    token_bytes: int


# ---- the chats ----------------------------------------------------------------------------------


def messages(work: Workload) -> list[list[list[int]]]:
    """Token ids of every chat's turns; the first one begins with the chat's system prompt."""
    rng = random.Random(SEED)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    systems = [tokens(work.system_tokens) for _ in range(work.system_prompts)]
    chats = []
    for index in range(work.chats):
        turns = [tokens(rng.randint(*work.message_tokens)) for _ in range(work.turns)]
        turns[0] = systems[index % work.system_prompts] + turns[0]
        chats.append(turns)
    return chats


def play(server: Server, work: Workload, progress: Progress) -> tuple[list[list[list[int]]], int]:
    """Run all chats at once; return their answers and the sum of cached tokens."""
    stop = threading.Event()

    def chat(turns: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
        context: list[int] = []
        answers, cached = [], 0
        for message in turns:
            if stop.is_set():
                break
            context += message
            (answer,) = server.generate([context], work.answer_tokens)
            context += answer.output_ids
            answers.append(answer.output_ids)
            cached += answer.cached_tokens
            progress.advance()
        return answers, cached

    threads = ThreadPoolExecutor(work.chats)
    try:
        futures = [threads.submit(chat, turns) for turns in messages(work)]
        for future in as_completed(futures):
            future.result()  # the first error ends the demo
    except BaseException:
        # Do not wait for answers: the server is about to be stopped, which ends the threads.
        stop.set()
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()
    results = [future.result() for future in futures]
    return [answers for answers, _ in results], sum(cached for _, cached in results)


# ---- what the server did ------------------------------------------------------------------------

_STEP = re.compile(r"Decode batch.*?#running-req: (\d+), #(?:full )?token: (\d+)(.*)")
_WINDOW = re.compile(r"#swa token: (\d+)")
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")
_JENGA_POOL = re.compile(r"jenga pool .*: (\d+) large pages of ")
_STOCK_POOL = re.compile(r"KV Cache is allocated.*#tokens: (\d+)")


def steps_of(log: str) -> list[Step]:
    steps = []
    for running, full, rest in _STEP.findall(log):
        window = _WINDOW.search(rest)
        steps.append(Step(int(running), int(full), int(window[1]) if window else None))
    return steps


def layers_of(model: Path) -> Layers:
    config = json.loads((model / "config.json").read_text())
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    window = kinds.count("sliding_attention")
    itemsize = {"float32": 4, "bfloat16": 2}[config.get("dtype") or config["torch_dtype"]]
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    return Layers(len(kinds) - window, window, 2 * heads * dim * itemsize)


def held_bytes(step: Step, layers: Layers) -> int:
    """Bytes of the slots that running requests hold; a shared prefix counts once."""
    window = step.full_tokens if step.window_tokens is None else step.window_tokens
    return (layers.full * step.full_tokens + layers.window * window) * layers.token_bytes


def needed_bytes(step: Step, layers: Layers) -> int:
    """Bytes that the step's attention reads: every token in full layers, WINDOW ones per request
    in window layers."""
    window = min(step.full_tokens, step.running * WINDOW)
    return (layers.full * step.full_tokens + layers.window * window) * layers.token_bytes


def pool_bytes(log: str, layers: Layers) -> int:
    """Size of the KV buffers: jenga's large pages, or stock's slots and the padding one."""
    sizes = [count * layers.token_bytes for count in (layers.full, layers.window) if count]
    if larges := _JENGA_POOL.search(log):
        return int(larges[1]) * math.lcm(*sizes)
    return (int(_STOCK_POOL.search(log)[1]) + 1) * sum(sizes)


def busiest(steps: Sequence[Step]) -> Step:
    return max(steps, key=lambda step: (step.running, step.full_tokens))


# ---- one server, one table ----------------------------------------------------------------------


class Progress:
    """One line per server: overwritten on a terminal, a few lines elsewhere."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self.lock = threading.Lock()
        self.live = sys.stdout.isatty()

    def say(self, text: str, *, last: bool = False) -> None:
        line = f"{self.title:<22} {text}"
        if self.live:
            print(f"\r{line}\x1b[K", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def advance(self) -> None:
        with self.lock:
            self.done += 1
            if self.live or self.done % max(1, self.total // 4) == 0:
                bar = "#" * (24 * self.done // self.total)
                self.say(f"playing [{bar:<24}] {self.done}/{self.total} answers")


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.startswith(b"GPU")


def flags_for(model: Model, backend: str, work: Workload, *, gpu: bool) -> list[str]:
    flags = ["--max-total-tokens", str(model.max_total_tokens), "--decode-log-interval", "1"]
    flags += ["--max-running-requests", str(work.chats)]
    if gpu:
        # Batches differ between the two servers; sums must not depend on who else is in a batch.
        flags += ["--attention-backend", "triton", "--enable-deterministic-inference"]
        flags += ["--disable-cuda-graph", "--skip-server-warmup", "--mem-fraction-static", "0.3"]
    if backend == "jenga":
        flags += ["--memory-backend", "jenga"]
    return flags


def run_server(model: Model, folder: Path, backend: str, work: Workload, *, gpu: bool) -> Outcome:
    progress = Progress(f"{model.family}, {backend}", work.chats * work.turns)
    progress.say("starting the server")
    server = Server(folder, *flags_for(model, backend, work, gpu=gpu), gpu=gpu)
    try:
        with server:
            start = time.monotonic()
            answers, cached = play(server, work, progress)
            took = time.monotonic() - start
            log = server.log()
    except requests.RequestException as error:
        raise ServerFailed(f"{error}\n{server.log(60)}") from error
    finally:
        server.log_path.unlink(missing_ok=True)
    progress.say(f"started in {server.boot_took:.0f} s, played in {took:.0f} s", last=True)
    layers = layers_of(folder)
    step = busiest(steps_of(log))
    return Outcome(
        answers,
        cached,
        sum(map(int, _RETRACTED.findall(log))),
        pool_bytes(log, layers),
        held_bytes(step, layers),
        needed_bytes(step, layers),
        step.running,
    )


HEAD = (
    ("", "KV pool", "concurrent", "retrac-", "cached", "KV bytes at that moment", "identical"),
    ("", "bytes", "requests", "tions", "tokens", "held / needed", "tokens"),
)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Align columns; a row of one cell is a heading of its own."""
    cells = [row for row in (*HEAD, *rows) if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in (*HEAD, *rows):
        if values:
            right = (cell.rjust(width) for cell, width in zip(values, widths[1:], strict=True))
            name = "  ".join([name.ljust(widths[0]), *right])
        lines.append(name)
    lines.insert(len(HEAD), "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def rows_of(model: Model, outcomes: dict[str, Outcome]) -> Iterator[tuple[str, ...]]:
    yield (model.title,)
    for backend, got in outcomes.items():
        same = got.answers == outcomes["stock"].answers
        yield (
            f"  {backend}",
            f"{got.pool_bytes:,}",
            str(got.concurrent),
            str(got.retractions),
            f"{got.cached_tokens:,}",
            f"{got.held_bytes:,} / {got.needed_bytes:,} ({got.held_bytes / got.needed_bytes:.2f}x)",
            "-" if backend == "stock" else "yes" if same else "NO",
        )


def footnotes(work: Workload, *, gpu: bool) -> str:
    return f"""
{work.chats} chats at a time, {work.turns} turns each; {work.system_prompts} system prompts of \
{work.system_tokens} tokens shared between them;
answers of {work.answer_tokens} tokens, greedy, on the {"GPU" if gpu else "CPU engine"}. \
Weights are random: what counts is that tokens agree.

  concurrent requests  most requests in one decode step, from the server's log of every step
  retractions          running requests put back because KV ran out, from the log
  cached tokens        prompt tokens not computed again, sum of meta_info.cached_tokens
  held                 bytes of the slots that running requests hold in that busiest step
  needed               bytes its attention reads: every token in full layers, the last
                       {WINDOW} of each request in window layers"""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the demo once; a second one must not stop the clean-up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--cpu", action="store_true", help="use the CPU engine even if there is a GPU"
    )
    options = parser.parse_args(argv)
    gpu = has_gpu() and not options.cpu
    work = Workload()
    rows: list[tuple[str, ...]] = []
    identical = True
    try:
        with stop_signals():
            for model in MODELS:
                dtype = "bfloat16" if gpu else "float32"
                folder = write_tiny_model(
                    model.family,
                    MODEL_CACHE / f"{model.family}-{dtype}",
                    num_layers=model.num_layers,
                    window=WINDOW,
                    dtype=dtype,
                )
                outcomes = {
                    backend: run_server(model, folder, backend, work, gpu=gpu)
                    for backend in BACKENDS
                }
                identical &= outcomes["jenga"].answers == outcomes["stock"].answers
                rows += rows_of(model, outcomes)
    except KeyboardInterrupt:
        print("\nstopped; every server process is gone", file=sys.stderr)
        return 130
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n{footnotes(work, gpu=gpu)}")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
