"""Concurrent requests on equal KV bytes: stock SGLang against jenga, on real engines.

    python -m benchmarks.engines.bench_capacity                # all rows, CPU engine
    python -m benchmarks.engines.bench_capacity gemma-3-27b

The layer mixes are the real models'; heads are tiny, and window and prompt are scaled down alike,
and so are image, question and answer of Llama 3.2 Vision, from 6,404, 43 and 200 tokens.
Both sides get the same --max-total-tokens, which pins jenga's pool to the bytes that so many tokens
take in stock SGLang. Concurrency is the most running requests that SGLang's own decode log reports.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.layers.base import Load
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.engines import Pictured, Run, run_engine
from sglang_jenga.testing.families import FAMILY_ARGUMENTS
from sglang_jenga.testing.tiny_mllama import picture, prompt, write_tiny_mllama
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model


class Mix(NamedTuple):
    """A real model's layers; ``window`` and ``prompt`` in tokens, the real ones scaled down
    alike.

    ``stock_requests``: how many such requests the pool should hold in stock SGLang.
    """

    family: str
    layers: int
    window: int
    prompt: int
    stock_requests: int
    overrides: dict[str, Any]
    new_tokens: int = 32
    image: int = 0  # tokens of an image before the prompt


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
GPT_OSS = {
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "swa_num_key_value_heads": 1,
}
VISION = {"cross_layers": tuple(range(3, 40, 5)), "tile": 280}  # 20 * 20 + 1 patches
MIXES = {
    "gemma-3-27b": Mix("gemma3_text", 62, 64, 512, 16, HEADS),
    "gemma-2-9b": Mix("gemma2", 42, 64, 256, 32, HEADS),
    # Its 12 full and 12 window layers on Gemma-4's code, which is hybrid in stock too: SGLang's CPU
    # attention does not serve gpt-oss itself.
    "gpt-oss-20b": Mix("gemma4", 24, 16, 1024, 16, GPT_OSS),
    # Its window, 32,768 tokens, and prompts of 80k and 8k tokens, over 128.
    "ministral-8b, 80k": Mix("ministral", 36, 256, 640, 18, HEADS),
    "ministral-8b, 8k": Mix("ministral", 36, 256, 64, 16, HEADS),
    "llama (dense)": Mix("llama", 8, 0, 512, 24, HEADS),
    "llama-3.2-11b-vision": Mix("mllama", 40, 0, 11, 8, VISION, new_tokens=50, image=4 * 401),
}


def measure(name: str, mix: Mix, folder: Path) -> dict[str, Any]:
    """Run both sides; returns the row's numbers."""
    count = mix.stock_requests * (6 if mix.image else 4)
    model, prompts = _pictured(mix, folder, count) if mix.image else _texts(mix, folder, count)
    total = mix.image + mix.prompt + mix.new_tokens
    tokens = mix.stock_requests * (total + 2)
    common: dict[str, Any] = {
        "max_total_tokens": tokens,
        "max_running_requests": count,
        "chunked_prefill_size": None if mix.image else 128,  # SGLang cuts no image
        "decode_log_interval": 1,
        "max_new_tokens": mix.new_tokens,
        "seconds": 3000,
        "skip_tokenizer_init": not mix.image,
        **FAMILY_ARGUMENTS.get(mix.family, {}),
    }
    stock = run_engine(model, [prompts], prepare=_read_windows, **common)
    jenga = run_engine(model, [prompts], memory_backend="jenga", **common)
    pool_bytes, groups = _pool(jenga, mix)
    bound = pool_bytes / sum(
        group.held(Load(total, encoder=mix.image)) * group.entry_bytes for group in groups
    )
    held, reached = _concurrency(stock), _concurrency(jenga)
    return {
        "mix": name,
        "pool_bytes": pool_bytes,
        "stock": held,
        "jenga": reached,
        "ratio": reached / held,
        "bound": bound,
        "of_bound": reached / bound,
        "retractions": (stock.retractions, jenga.retractions),
        "same": sum(a == b for a, b in zip(stock.outputs[0], jenga.outputs[0], strict=True)),
        "count": count,
    }


def _texts(mix: Mix, folder: Path, count: int) -> tuple[Path, list[list[int]]]:
    window = {"window": mix.window} if mix.window else {}
    model = write_tiny_model(
        mix.family, folder / mix.family, num_layers=mix.layers, **window, **mix.overrides
    )
    rng = random.Random(0)
    return model, [[rng.randrange(3, VOCAB_SIZE) for _ in range(mix.prompt)] for _ in range(count)]


def _pictured(mix: Mix, folder: Path, count: int) -> tuple[Path, list[Pictured]]:
    """Each prompt has a picture of its own, which is a token of the text as well."""
    model = write_tiny_mllama(folder / mix.family, num_layers=mix.layers, **mix.overrides)
    text = "what is this?"[: mix.prompt - 1]
    return model, [prompt(text, picture(number)) for number in range(count)]


def _read_windows() -> None:
    """SGLang's CPU attention misreads the window pools of models that are hybrid in stock; lend
    stock our read translation, so that it can run at all."""
    from sglang_jenga.boot import hook_table, hooks

    hooks.apply(hook_table.CPU_ATTENTION)


def _concurrency(run: Run) -> int:
    return max(run.running)


def _pool(run: Run, mix: Mix) -> tuple[int, list[LayerGroup]]:
    """Bytes of the pool and its layer groups, as the server logged them."""
    pool_bytes, entries = re.search(
        r"jenga plan pool_bytes=(\d+) .*entry_bytes=([\d,]+)", run.log
    ).groups()
    full, *others = (int(entry) for entry in entries.split(","))
    groups = [LayerGroup(Full(), (0,), full)]
    kind = Cross() if mix.image else Window(mix.window)
    groups += [LayerGroup(kind, (1,), entry) for entry in others]
    return int(pool_bytes), groups


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixes", nargs="*", choices=[*MIXES, []], help="default: all")
    options = parser.parse_args(argv)
    print(
        f"{'layer mix':20} {'window':>6} {'prompt':>6} {'image':>5} {'pool MiB':>8} "
        f"{'stock':>6} {'jenga':>6} {'ratio':>6} {'bound':>6} {'of bound':>8} {'retracted':>9} "
        f"{'same tokens':>11}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        for name in options.mixes or MIXES:
            mix = MIXES[name]
            row = measure(name, mix, Path(folder))
            print(
                f"{name:20} {mix.window:6} {mix.prompt:6} {mix.image:5} "
                f"{row['pool_bytes'] / 2**20:8.1f} {row['stock']:6} {row['jenga']:6} "
                f"{row['ratio']:5.2f}x {row['bound']:6.1f} "
                f"{100 * row['of_bound']:7.1f}% {'{}/{}'.format(*row['retractions']):>9} "
                f"{row['same']:5}/{row['count']}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
