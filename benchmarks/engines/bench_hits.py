"""Tokens hit in the prefix cache on equal KV bytes: stock SGLang, jenga, jenga with a part off.

    python -m benchmarks.engines.bench_hits                    # every model and workload
    python -m benchmarks.engines.bench_hits gemma3 --workloads chat trees
    python -m benchmarks.engines.bench_hits --ablate  # and each part of the policy off, one by one

Real engines, the same requests in the same waves, chats continued from the real answers. Layer
mixes are those of real models with tiny heads; lengths are a sixteenth of what is usually quoted.
Hit tokens are what SGLang reports as cached, per request.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines.bench_capacity import _read_windows
from sglang_jenga.serving.ablation import ENV, CacheOptions
from sglang_jenga.testing.engines import Run, Wave, run_engine
from sglang_jenga.testing.families import EXACT, FAMILY_ARGUMENTS, STOCK_STATES
from sglang_jenga.testing.tiny_models import (
    STATE_FAMILIES,
    VOCAB_SIZE,
    WINDOW_FAMILIES,
    write_tiny_model,
)

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
GEMMA4 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "swa_num_key_value_heads": 1,
}
WINDOW = 64


TRACKED = {"disable_overlap_schedule": False}  # SGLang's default for these models: extra_buffer


class Model(NamedTuple):
    """A layer mix; ``note``: how stock SGLang stores it. ``states``: how both cache states."""

    family: str
    layers: int | None
    overrides: dict[str, Any]
    note: str
    states: dict[str, Any] = STOCK_STATES


MODELS = {
    "llama": Model("llama", 4, HEADS, "full attention only"),
    "gemma3": Model("gemma3_text", 12, HEADS, "stock: full KV for all layers"),
    "gemma4": Model("gemma4", 12, GEMMA4, "stock: window pool, ratio 0.8"),
    "qwen3-next": Model("qwen3_next", None, {}, "stock: states cut at boot, ratio 0.9"),
    "qwen3-next-tracked": Model("qwen3_next", None, {}, "the same, states tracked", TRACKED),
}
# Of qwen3-next in float32; stock's cut gives states 0.9 of the KV's bytes.
TOKEN_BYTES, STATE_BYTES, STATE_RATIO = 256, 16896, 0.9


class Workload(NamedTuple):
    """``tokens``: --max-total-tokens, a fraction of what caching everything would take."""

    waves: Callable[[random.Random], list[Wave]]
    new_tokens: int
    tokens: int
    running: int


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, VOCAB_SIZE) for _ in range(count)]


def chat(rng: random.Random, chats: int = 10, rounds: int = 12) -> list[Wave]:
    """Conversations of 12 rounds, all with one system prompt, each going on from its answers."""
    system = words(rng, 64)
    turns = [[words(rng, 40) for _ in range(chats)] for _ in range(rounds)]
    prompts = [[system + turn for turn in turns[0]]]

    def next_round(at: int) -> Wave:
        def wave(outputs: list[list[list[int]]]) -> list[list[int]]:
            prompts.append(
                [
                    before + answer + turn
                    for before, answer, turn in zip(
                        prompts[at - 1], outputs[at - 1], turns[at], strict=True
                    )
                ]
            )
            return prompts[at]

        return wave

    return [prompts[0], *(next_round(at) for at in range(1, rounds))]


def groups(rng: random.Random, count: int = 64, size: int = 16) -> list[Wave]:
    """64 groups of 16 prompts that share a prefix, shuffled (SGLang's generated-shared-prefix)."""
    shared = [words(rng, 128) for _ in range(count)]
    prompts = [prefix + words(rng, 8) for prefix in shared for _ in range(size)]
    rng.shuffle(prompts)
    return [prompts[at : at + 128] for at in range(0, len(prompts), 128)]


def trees(rng: random.Random, problems: int = 8, branching: int = 3, depth: int = 4) -> list[Wave]:
    """Tree of thought: every thought is continued by three, level by level, then the best path's
    middle is taken up again."""
    level = [words(rng, 200) for _ in range(problems)]
    waves = [level]
    for _ in range(depth - 1):
        level = [parent + words(rng, 32) for parent in level for _ in range(branching)]
        level = rng.sample(level, min(len(level), problems * branching))
        waves.append(level)
    return [*waves, [path[:220] + words(rng, 24) for path in level]]


def documents(rng: random.Random, count: int = 14, questions: int = 4) -> list[Wave]:
    """Long documents, four questions each, three documents being read at a time."""
    texts = [words(rng, 700) for _ in range(count)]
    asked: list[list[int]] = []
    for first in range(0, count, 3):
        batch = [text for text in texts[first : first + 3] for _ in range(questions)]
        rng.shuffle(batch)
        asked += batch
    prompts = [text + words(rng, 16) for text in asked]
    return [prompts[at : at + 3] for at in range(0, len(prompts), 3)]


def edits(rng: random.Random, chats: int = 10) -> list[Wave]:
    """Long answers, each then cut in its middle and taken up from there; memory is idle."""
    prompts = [words(rng, 60) for _ in range(chats)]
    turns = [words(rng, 20) for _ in range(chats)]

    def cut(outputs: list[list[list[int]]]) -> list[list[int]]:
        parts = zip(prompts, outputs[0], turns, strict=True)
        return [prompt + answer[:80] + turn for prompt, answer, turn in parts]

    return [prompts, cut]


WORKLOADS = {
    "chat": Workload(chat, 24, 4500, 10),
    "groups": Workload(groups, 8, 4000, 16),
    "trees": Workload(trees, 24, 2400, 8),
    "documents": Workload(documents, 8, 1900, 3),
    "edits": Workload(edits, 240, 8000, 10),
}


def hit_tokens(run: Run) -> int:
    return sum(map(sum, run.cached))


def measure(path: str | Path, name: str, model: Model, off: str | None, backend: str) -> Run:
    workload = WORKLOADS[name]
    states: dict[str, Any] = {}
    if model.family in STATE_FAMILIES:
        slots = int(workload.tokens * TOKEN_BYTES * STATE_RATIO / STATE_BYTES)
        states = model.states | {"max_mamba_cache_size": slots}
    return run_engine(
        path,
        workload.waves(random.Random(0)),
        max_new_tokens=workload.new_tokens,
        max_total_tokens=workload.tokens,
        max_running_requests=workload.running,
        chunked_prefill_size=256,
        memory_backend=backend,
        prepare=_read_windows if backend == "default" else None,
        env=EXACT | ({ENV: off} if off else {}),
        seconds=1200,
        **FAMILY_ARGUMENTS.get(model.family, {}),
        **states,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--workloads", nargs="*", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument(
        "--ablate", nargs="*", choices=CacheOptions._fields, help="default: all parts"
    )
    options = parser.parse_args(argv)
    parts = () if options.ablate is None else options.ablate or CacheOptions._fields
    columns = ["stock", "jenga", *(f"- {part}" for part in parts)]
    print(f"| model | workload | {' | '.join(columns)} | jenga / stock | retracted | same tokens |")
    print("|---" * (len(columns) + 5) + "|")
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        for key in options.models or MODELS:
            model = MODELS[key]
            window = {"window": WINDOW} if model.family in WINDOW_FAMILIES else {}
            path = write_tiny_model(
                model.family,
                Path(folder) / key,
                num_layers=model.layers,
                **window,
                **model.overrides,
            )
            for name in options.workloads:
                stock = measure(path, name, model, None, "default")
                jenga = measure(path, name, model, None, "jenga")
                without = [measure(path, name, model, part, "jenga") for part in parts]
                hits = [hit_tokens(run) for run in (stock, jenga, *without)]
                same = sum(
                    a == b
                    for x, y in zip(stock.outputs, jenga.outputs, strict=True)
                    for a, b in zip(x, y, strict=True)
                )
                print(
                    f"| {key} | {name} | {' | '.join(f'{count:,}' for count in hits)} "
                    f"| **{hits[1] / max(hits[0], 1):.2f}** "
                    f"| {stock.retractions} / {jenga.retractions} "
                    f"| {same} / {sum(map(len, stock.outputs))} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
