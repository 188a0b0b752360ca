"""Greedy answers of tiny models, stock SGLang against jenga, on every backend that is here.

    python -m benchmarks.gpu.bench_parity                       # on a GPU
    python -m benchmarks.gpu.bench_parity --device cpu --only gemma3_text
    python -m benchmarks.gpu.bench_parity --key today --json rows.json  # again: goes on from there
    python -m benchmarks.gpu.bench_parity --jobs 4   # cells at once: 8 servers of 6 GB

Mixes of layers x attention backends, with page sizes 1, 16 and 64, overlap and CUDA graphs on and
off dealt out so that each backend meets each of them; on trtllm_mha and fa4 one model or two. Stock
and jenga start side by side on the same flags; prompts come one at a time, so that both run the
same batches, then go on from their answers, so that what is hit was written while decoding. A
near-tie of two tokens may go either way where batches differ, in stock as well: where jenga hits
what stock does not, or an answer goes on from such a one, the two are counted apart. mllama's
prompts have pictures.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from requests import RequestException

from benchmarks.gpu.suite import UNFINISHED
from benchmarks.gpu.timing import Column, Deadline, Report, machine, require_cuda
from sglang_jenga.testing import tiny_mllama
from sglang_jenga.testing.engines import Pictured
from sglang_jenga.testing.gpu_backends import missing
from sglang_jenga.testing.servers import Answer, Server, ServerFailed
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

WINDOW, NEW_TOKENS = 32, 12
# Heads as wide as FlashInfer and the kernels for linear attention take them.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "num_layers": 6},
    "qwen3_next": {"head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "lfm2": {"head_dim": 64},
    "jet_nemotron": {"head_dim": 64, "hidden_size": 256},
    "falcon_h1": {"head_dim": 64},
    "gpt_oss": {"head_dim": 64, "swiglu_limit": 7.0},  # SGLang reads what transformers 5.17 has not
    "jamba": {"head_dim": 64, "hidden_size": 256},
    "mllama": {"hidden_size": 256},
}
STATES = ("qwen3_next", "lfm2", "jet_nemotron", "falcon_h1", "jamba")
ONE_WAY = ("jamba", "mllama")
"""Models that are served one step after another."""
BY_TOKEN = ("lfm2", "jet_nemotron", "jamba", "mllama")
"""Models that are served at page size 1."""
BACKENDS = {
    "cuda": ("fa3", "flashinfer", "triton", "trtllm_mha", "fa4"),
    "cpu": ("torch_native",),
}
REFUSED_BY_SGLANG = {("lfm2", "triton"), ("gpt_oss", "flashinfer"), ("mllama", "triton")}
# The pool serves trtllm_mha one type of layer before Blackwell; SGLang fixes fa4's pages there.
FEW = {"trtllm_mha": ("llama",), "fa4": ("llama", "gemma3_text")}
COLUMNS = (
    Column("model", "model", width=14),
    Column("backend", "backend", width=12),
    Column("page_size", "page"),
    Column("overlap", "overlap"),
    Column("graphs", "graphs"),
    Column("answers", "computed alike"),
    Column("differing", "differing", "**{}**"),
    Column("others", "hit elsewhere"),
    Column("others_differing", "differing"),
    Column("hit_tokens", "tokens hit"),
    Column("seconds", "seconds"),
)


class Cell(NamedTuple):
    model: str
    backend: str
    page_size: int
    overlap: bool
    graphs: bool

    def shown(self) -> dict[str, Any]:
        """Its columns of a row."""
        words = {name: "on" if getattr(self, name) else "off" for name in ("overlap", "graphs")}
        return self._asdict() | words

    def flags(self, device: str) -> list[str]:
        common = ["--attention-backend", self.backend, "--page-size", str(self.page_size)]
        common += [] if self.overlap else ["--disable-overlap-schedule"]
        common += ["--random-seed", "1", "--skip-server-warmup"]
        if self.model in STATES and not self.overlap:
            common += ["--mamba-radix-cache-strategy", "no_buffer"]
        if device == "cpu":
            return common
        common += ["--dtype", "bfloat16", "--max-total-tokens", "16384"]
        common += ["--max-running-requests", "8", "--mem-fraction-static", "0.4"]
        if self.model in STATES:
            common += ["--max-mamba-cache-size", "64"]
        if self.model == "mllama":
            common += ["--mm-attention-backend", "sdpa"]
        # Graphs of prefills take minutes to compile, and read the pool as prefills without do.
        graphs = ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "8"]
        return common + (graphs if self.graphs else ["--disable-cuda-graph"])


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """The cell of a row."""
    return tuple(row[name] for name in Cell._fields)


def cells(device: str, models: Sequence[str]) -> Iterator[Cell]:
    """One per model and backend; page sizes and ways are dealt out along both."""
    for b, backend in enumerate(BACKENDS[device]):
        for m, model in enumerate(models):
            overlap, graphs = (m + b) % 2 == 0, (m // 2 + b) % 2 == 0
            page_size = (1, 16, 64)[(m + b) % 3]
            if model in ONE_WAY:
                overlap = False
            if model in BY_TOKEN or (model in STATES and not overlap):
                page_size = 1  # without overlap states are cached at page size 1
            if backend == "trtllm_mha":
                page_size = 64  # it knows no pages of one token
            if (model, backend) not in REFUSED_BY_SGLANG and model in FEW.get(backend, models):
                yield Cell(model, backend, page_size, overlap, graphs and device == "cuda")


def prompts() -> list[list[int]]:
    """Ten prompts of 11 to 180 tokens, most of them with one of two beginnings."""
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    heads = [tokens(100), tokens(40), []]
    return [heads[number % 3] + tokens(rng.randrange(11, 80)) for number in range(10)]


def pictured() -> list[Pictured]:
    """Eight questions with none, one and two of three pictures."""
    shown = [tiny_mllama.picture(seed) for seed in range(3)]
    sets = ([], shown[:1], shown[1:2], shown[:2])
    asked = ("what is this, and where?", "how many of them are there")
    return [tiny_mllama.prompt(text, *pictures) for text in asked for pictures in sets]


def talk(server: Server, model: str) -> list[Answer]:
    """Answers to the prompts, and in the same order to what goes on from them."""
    if model == "mllama":  # asked twice: its answers are no tokens that a text could go on from
        return server.generate(pictured() * 2, NEW_TOKENS, concurrency=1)
    first = prompts()
    answers = server.generate(first, NEW_TOKENS, concurrency=1)
    more = [
        [*prompt, *answer.output_ids, 7, 8, 9]
        for prompt, answer in zip(first, answers, strict=True)
    ]
    return answers + server.generate(more, NEW_TOKENS, concurrency=1)


def compare(stock: Sequence[Answer], ours: Sequence[Answer]) -> dict[str, int]:
    """How many answers were computed alike, from equal hits, and how many of them differ; and the
    same of the others."""
    half = len(ours) // 2
    alike = [a.cached_tokens == b.cached_tokens for a, b in zip(stock, ours, strict=True)]
    alike[half:] = [now and before for now, before in zip(alike[half:], alike[:half], strict=True)]
    differ = [a.output_ids != b.output_ids for a, b in zip(stock, ours, strict=True)]
    differing = sum(map(all, zip(alike, differ, strict=True)))
    return {
        "answers": sum(alike),
        "differing": differing,
        "others": len(ours) - sum(alike),
        "others_differing": sum(differ) - differing,
        "hit_tokens": sum(answer.cached_tokens for answer in ours),
    }


def is_right(found: dict[str, Any]) -> bool:
    """Whether a row compared something and found no difference."""
    return found["answers"] > 0 and not found["differing"]


def write_model(model: str, folder: Path, dtype: str) -> None:
    if model == "mllama":
        tiny_mllama.write_tiny_mllama(folder, **MODELS[model])
    else:
        write_tiny_model(model, folder, window=WINDOW, dtype=dtype, **MODELS[model])


def row(cell: Cell, folder: Path, device: str) -> dict[str, Any]:
    """Boot both, ask both."""
    start = time.monotonic()
    sides = ((), ("--memory-backend", "jenga"))
    both = [
        Server(folder, *cell.flags(device), *more, gpu=device == "cuda", boot_seconds=400)
        for more in sides
    ]
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        booted = list(threads.map(stack.enter_context, both))
        stock, ours = threads.map(lambda server: talk(server, cell.model), booted)
    seconds = round(time.monotonic() - start)
    return {**cell.shown(), **compare(stock, ours), "seconds": seconds}


def run(
    todo: Sequence[Cell],
    earlier: Sequence[dict[str, Any]],
    deadline: Deadline,
    report: Report,
    device: str,
    jobs: int = 1,
) -> int:
    """All cells, those in which an earlier run was right as it left them; an exit status."""
    right = {place(found): found for found in earlier if is_right(found)}
    kept = [cell for cell in todo if place(cell.shown()) in right]
    for cell in kept:  # first of all: a run that is stopped leaves them as well
        report.add(**right[place(cell.shown())])
    left = [cell for cell in todo if cell not in kept]
    good, answered = True, 0
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch, ThreadPoolExecutor(jobs) as pool:
        for model in {cell.model for cell in left}:
            write_model(model, Path(scratch) / model, dtype)

        def attempt(cell: Cell) -> dict[str, Any] | None:
            """Its row; None without time for it."""
            if deadline.passed():
                return None
            return row(cell, Path(scratch) / cell.model, device)

        cell_of = {pool.submit(attempt, cell): cell for cell in left}
        for done in as_completed(cell_of):
            try:
                found = done.result()
            except (ServerFailed, RequestException) as cause:
                report.note(f"{' '.join(map(str, cell_of[done]))}: {str(cause).splitlines()[0]}")
                print(cause)
                good = False
            else:
                if found is None:
                    continue
                report.add(**found)
                good &= is_right(found)
            answered += 1
    if answered < len(left):
        report.note(f"time was up after {len(report.rows)} of {len(todo)} cells")
        return UNFINISHED if good else 1
    return 0 if good and report.rows else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=None, metavar="MODEL")
    parser.add_argument("--device", choices=BACKENDS, default="cuda")
    parser.add_argument("--minutes", type=float, default=60, help="start no cell after that")
    parser.add_argument("--backends", nargs="+", default=None, metavar="BACKEND")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--key", default="", help="rows in --json with the same key are kept")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        require_cuda()
    report = Report(
        "parity",
        COLUMNS,
        "python -m benchmarks.gpu.bench_parity " + shlex.join(argv or sys.argv[1:]),
        machine() if options.device == "cuda" else "SGLang's CPU engine",
        json_path=options.json,
        markdown_path=options.markdown,
        key=options.key,
    )
    # Stock's CPU attention misreads windows, and its states are cut at boot: one model is enough.
    models = options.only or (list(MODELS) if options.device == "cuda" else ["llama"])
    absent = {name: why for name in BACKENDS[options.device] if (why := missing(name))}
    asked = options.backends or BACKENDS[options.device]
    todo = [
        cell
        for cell in cells(options.device, models)
        if cell.backend in asked and cell.backend not in absent
    ]
    earlier = report.earlier()  # before a note writes the file anew
    for name, why in absent.items():
        report.note(f"{name}: {why}")
    return run(todo, earlier, Deadline(options.minutes), report, options.device, options.jobs)


if __name__ == "__main__":
    raise SystemExit(main())
