"""Live servers on a GPU, on the same KV bytes: stock, SGLang's unified memory, and jenga.

    python -m benchmarks.gpu.bench_live                      # every model, one server after another
    python -m benchmarks.gpu.bench_live --models llama-3.1-8b --requests 64 --markdown table.md
    python -m benchmarks.gpu.bench_live --models gemma-3-12b --sides stock jenga --together

Sizes and kernels are those of the models, the weights are SGLang's dummies and the answers noise.
Each server gets the same prompts at once (*cold*), then the same again with its own answers and a
little more behind them (*chat*). `--together` boots all before and keeps the others idle while one
is measured: quicker, on a card that holds them. The pool is so small that not all prompts fit: the
server is full and has a queue. All get the same `--max-total-tokens`, stock as slots of every
layer, the others as the bytes of those. *step*: between two steps of decoding, in the median;
*wait*: until a request's first token, in the median and the longest.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from requests import RequestException

from benchmarks.gpu.timing import Column, Report, machine, require_cuda
from sglang_jenga.boot.chunks import CHUNK
from sglang_jenga.testing.gpu_backends import missing
from sglang_jenga.testing.servers import Answer, Server, ServerFailed

CONFIGS = Path(__file__).parents[2] / "tests" / "configs"
_CHUNK = ("--chunked-prefill-size", str(CHUNK))
SIDES = {
    "stock": _CHUNK,
    "unified": ("--enable-unified-memory", *_CHUNK),
    "jenga": ("--memory-backend", "jenga"),  # decode steps in chunks of so many tokens
    "stock-mixed": ("--enable-mixed-chunk", *_CHUNK),
    "jenga-unmixed": ("--memory-backend", "jenga", *_CHUNK),
}
DEFAULT_SIDES = ("stock", "unified", "jenga")
# What the planner's configurations need not say, and a server must know.
SIZES = {
    "gemma-2-9b": {
        "intermediate_size": 14336,
        "vocab_size": 256000,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 16384,  # the second round goes beyond its 8,192
    },
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 256,
        "intermediate_size": 15360,
        "vocab_size": 262208,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
    },
    "llama-3.1-8b": {"intermediate_size": 14336, "vocab_size": 128256},
    "falcon-h1-7b": {
        "intermediate_size": 12288,
        "vocab_size": 130048,
        "mamba_chunk_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    },
}
# Close to Gemma-2's 8192 tokens; its window layers see half of them.
PROMPT, NEW_TOKENS, MORE, POOL_TOKENS = 7680, 256, 64, 65536
ROUNDS = ("cold", "chat")
COLUMNS = (
    Column("model", "model", width=12),
    Column("attention", "attention"),
    Column("side", "memory"),
    Column("round", "round"),
    Column("tps", "tokens/s", "{:.0f}"),
    Column("ratio", "of the first's", "**{:.2f}**"),
    Column("running", "running", "{:.1f}"),
    Column("hits", "tokens hit", "{:,}"),
    Column("step", "step, ms", "{:.2f}"),
    Column("wait", "wait, s", "{:.1f}"),
    Column("longest", "longest, s", "{:.1f}"),
)


def flags(side: str, attention: str, pool_tokens: int) -> list[str]:
    return [
        *("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"),
        *("--attention-backend", attention, "--max-total-tokens", str(pool_tokens)),
        *("--cuda-graph-max-bs-decode", "64", "--disable-prefill-cuda-graph"),
        *("--decode-log-interval", "1", "--skip-server-warmup", "--enable-metrics"),
        *SIDES[side],
    ]


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        config = json.loads((CONFIGS / f"{model}.json").read_text())
        config = config.get("text_config", config) | SIZES[model]
        (Path(name) / "config.json").write_text(json.dumps(config))
        yield Path(name)


def ask(server: Server, prompts: Sequence[Sequence[int]]) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to prompts that come at once, and the figures of that round."""
    skip = len(server.log())
    start = time.monotonic()
    answers = server.generate(prompts, NEW_TOKENS)
    took = time.monotonic() - start
    log = server.log()[skip:]
    running = [int(n) for n in re.findall(r"Decode batch.*?#running-req: (\d+)", log)]
    rates = [float(n) for n in re.findall(r"gen throughput \(token/s\): ([\d.]+)", log)]
    full = [1e3 * n / rate for n, rate in zip(running, rates, strict=True) if rate > 0]
    waits = [answer.meta["first_token_latency"] for answer in answers]
    return answers, {
        "tps": len(prompts) * NEW_TOKENS / took,
        "running": statistics.mean(running),
        "hits": sum(answer.cached_tokens for answer in answers),
        "step": statistics.median(full),
        "wait": statistics.median(waits),
        "longest": max(waits),
    }


def measure(server: Server, prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """The figures of both rounds."""
    server.generate(prompts[:2], 8)  # compiles what boot did not
    server.flush_cache()
    rng = random.Random(1)
    answers, cold = ask(server, prompts)
    more = [
        [*prompt, *answer.output_ids, *tokens(rng, MORE)]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {"cold": cold, "chat": ask(server, more)[1]}


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 30_000) for _ in range(count)]


def run(model: str, attention: str, options: argparse.Namespace, report: Report) -> None:
    """Two rows of each side, each as soon as it is known, or a note of why a side has none."""
    rng = random.Random(0)
    prompts = [tokens(rng, PROMPT) for _ in range(options.requests)]
    first: dict[str, float] = {}

    def failed(side: str, cause: Exception) -> None:
        report.note(f"{model}, {side}: {str(cause).splitlines()[0]}")
        print(cause)

    with folder_of(model) as folder, ExitStack() as stack:
        servers = {
            side: Server(
                folder,
                *flags(side, attention, options.pool_tokens),
                gpu=True,
                boot_seconds=options.boot_seconds,
            )
            for side in options.sides
        }
        if options.together:
            with ThreadPoolExecutor() as threads:
                booted = {
                    side: threads.submit(stack.enter_context, server)
                    for side, server in servers.items()
                }
            for side, boot in booted.items():
                if cause := boot.exception():
                    failed(side, cause)
                    del servers[side]
        for side, server in servers.items():
            try:
                with nullcontext() if options.together else server:
                    figures = measure(server, prompts)
            except (ServerFailed, RequestException) as cause:
                failed(side, cause)
                continue
            for name in ROUNDS:
                first.setdefault(name, figures[name]["tps"])
                report.add(
                    model=model,
                    attention=attention,
                    side=side,
                    round=name,
                    ratio=figures[name]["tps"] / first[name],
                    **figures[name],
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--attention-backend", help="of both servers (default fa3, else triton)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT_SIDES)
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS)
    parser.add_argument("--boot-seconds", type=float, default=420)
    parser.add_argument("--together", action="store_true", help="boot all, then measure each")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    options = parser.parse_args(argv)
    require_cuda()
    why = missing("fa3")
    attention = options.attention_backend or ("triton" if why else "fa3")
    command = " ".join(["python -m benchmarks.gpu.bench_live", *(argv or sys.argv[1:])])
    report = Report(
        "live",
        COLUMNS,
        command,
        machine(),
        json_path=options.json,
        markdown_path=options.markdown,
    )
    if why and not options.attention_backend:
        report.note(f"with {attention}: {why}")
    for model in options.models:
        run(model, attention, options, report)
    wanted = len(options.models) * len(options.sides) * len(ROUNDS)
    return 0 if len(report.rows) == wanted else 1


if __name__ == "__main__":
    raise SystemExit(main())
