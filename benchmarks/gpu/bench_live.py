"""A live server on a GPU, stock against jenga, on the same KV bytes: throughput and concurrency.

    python -m benchmarks.gpu.bench_live                      # Gemma-2-9B and Llama-3.1-8B
    python -m benchmarks.gpu.bench_live --models llama-3.1-8b --requests 64 --markdown table.md

Sizes and kernels are those of the models, the weights are SGLang's dummies and the answers noise.
One server after the other; each gets the same prompts at once. `--together` boots both before and
keeps one idle while the other is measured: quicker, on a card that holds both. The pool is so small
that not all prompts fit: what counts is how many run at a time and what that is worth. Both get the
same `--max-total-tokens`, stock as slots of every layer, jenga as the bytes of those.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.timing import Column, Report, machine, require_cuda
from sglang_jenga.testing.gpu_backends import missing
from sglang_jenga.testing.servers import Server, ServerFailed

CONFIGS = Path(__file__).parents[2] / "tests" / "configs"
SIDES = {"stock": "default", "jenga": "jenga"}
# What the planner's configurations need not say, and a server must know.
SIZES = {
    "gemma-2-9b": {"intermediate_size": 14336, "vocab_size": 256000, "query_pre_attn_scalar": 256},
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 256,
        "intermediate_size": 15360,
        "vocab_size": 262208,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
    },
    "llama-3.1-8b": {"intermediate_size": 14336, "vocab_size": 128256},
}
# Close to Gemma-2's 8192 tokens; its window layers see half of them.
PROMPT, NEW_TOKENS, POOL_TOKENS = 7680, 256, 65536
COLUMNS = (
    Column("model", "model", width=16),
    Column("attention", "attention"),
    Column("stock tps", "stock, tokens/s", "{:.0f}"),
    Column("jenga tps", "jenga, tokens/s", "{:.0f}"),
    Column("ratio", "ratio", "**{:.2f}**"),
    Column("stock running", "stock, running", "{:.0f}"),
    Column("jenga running", "jenga, running", "{:.0f}"),
    Column("stock step", "stock, ms / token", "{:.2f}"),
    Column("jenga step", "jenga, ms / token", "{:.2f}"),
)


def flags(backend: str, attention: str) -> list[str]:
    memory = [] if backend == "default" else ["--memory-backend", backend]
    return [
        *("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"),
        *("--attention-backend", attention, "--max-total-tokens", str(POOL_TOKENS)),
        *("--chunked-prefill-size", "2048", "--cuda-graph-max-bs-decode", "64"),
        *("--disable-prefill-cuda-graph", "--decode-log-interval", "1", "--skip-server-warmup"),
        *memory,
    ]


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        config = json.loads((CONFIGS / f"{model}.json").read_text())
        config = config.get("text_config", config) | SIZES[model]
        (Path(name) / "config.json").write_text(json.dumps(config))
        yield Path(name)


def server_of(folder: Path, side: str, attention: str) -> Server:
    return Server(folder, *flags(SIDES[side], attention), gpu=True, boot_seconds=420)


def measure(server: Server, prompts: list[list[int]]) -> dict[str, float]:
    server.generate(prompts[:2], 8)  # compiles what boot did not
    server.flush_cache()
    skip = len(server.log())
    start = time.monotonic()
    server.generate(prompts, NEW_TOKENS)
    took = time.monotonic() - start
    log = server.log()[skip:]
    running = [int(n) for n in re.findall(r"Decode batch.*?#running-req: (\d+)", log)]
    rates = [float(n) for n in re.findall(r"gen throughput \(token/s\): ([\d.]+)", log)]
    full = [1e3 * n / rate for n, rate in zip(running, rates, strict=True) if rate > 0]
    return {
        "tps": len(prompts) * NEW_TOKENS / took,
        "running": statistics.mean(running),
        "step": statistics.median(full),
    }


def row(model: str, attention: str, requests: int, together: bool) -> dict[str, Any]:
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 30_000) for _ in range(PROMPT)] for _ in range(requests)]
    found = {}
    with folder_of(model) as folder, ExitStack() as stack:
        if together:
            servers = [server_of(folder, side, attention) for side in SIDES]
            with ThreadPoolExecutor() as threads:
                booted = threads.map(stack.enter_context, servers)
                found = {
                    side: measure(server, prompts)
                    for side, server in zip(SIDES, list(booted), strict=True)
                }
        else:
            for side in SIDES:
                with server_of(folder, side, attention) as server:
                    found[side] = measure(server, prompts)
    cells = {f"{side} {key}": value for side, each in found.items() for key, value in each.items()}
    return {
        "model": model,
        "attention": attention,
        "ratio": cells["jenga tps"] / cells["stock tps"],
        **cells,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--attention-backend", help="of both servers (default fa3, else triton)")
    parser.add_argument("--together", action="store_true", help="boot both, then measure each")
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
        try:
            report.add(**row(model, attention, options.requests, options.together))
        except ServerFailed as cause:
            report.note(f"{model}: {str(cause).splitlines()[0]}")
            print(cause)
    return 0 if len(report.rows) == len(options.models) else 1


if __name__ == "__main__":
    raise SystemExit(main())
