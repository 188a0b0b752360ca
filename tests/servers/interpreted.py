"""Servers whose Triton kernels run in Triton's interpreter, on a machine without a GPU.

    TRITON_INTERPRET=1 python -m tests.servers.interpreted                       # all six
    TRITON_INTERPRET=1 python -m tests.servers.interpreted gemma3_text:16 llama:1

SGLang's Triton attention and its writes of request rows, and our kernels that zero and copy, run
line by line as they would on a card, under pressure: fewer than half of the prompts' tokens fit at
once, so that cached pages are evicted, which a run has to show. Answers are compared with those of
stock SGLang on the same kernels. Recurrent layers compute with the CPU engine's operators, and
SGLang's Triton ones are interpreted in `tests/kernels`. Triton decides on its interpreter when it
is imported, so this is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FULL_KV
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE, WINDOW_FAMILIES
from tests.servers.parity import model_of

CELLS = (
    "llama:16",
    "gemma3_text:1",
    "gemma3_text:16",
    "gemma4:1",
    "qwen3_next:1",
    "jet_nemotron:1",
)
"""Dense; full and window; the same with other heads; full and state; full, window and state."""
NEW_TOKENS = 4
POOL_TOKENS = 224
TOKENS_PER_STATE = 40
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}


def prompts() -> list[list[int]]:
    """Six prompts of 43 to 80 tokens, of two beginnings."""
    rng = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    heads = [tokens(40), tokens(34)]
    return [heads[index % 2] + tokens(rng.randrange(9, 40)) for index in range(6)]


def goes_on(answers: list[list[list[int]]]) -> list[list[int]]:
    """The first prompts with their answers: what is hit was written while decoding."""
    first = zip(prompts()[:3], answers[0][:3], strict=True)
    return [[*prompt, *answer, 7, 8, 9] for prompt, answer in first]


def goes_back(answers: list[list[list[int]]]) -> list[list[int]]:
    """The first prompts alone, and another ending. Where layers have windows: of these SGLang's
    Triton kernels read a token less when they decode than when they prefill, in stock as well, so
    an answer that was evicted and is computed again leaves other keys than one that is hit."""
    return [[*prompt, 7, 8, 9] for prompt in prompts()[:3]]


def tell() -> None:
    """In the engine: say in its log what zeroes, what copies, and how many pages are evicted while
    requests want their room."""
    from sglang_jenga.memory import ops
    from sglang_jenga.serving.eviction import Eviction

    admit_too_many()
    fit = Eviction.to_fit

    def fitted(self: Any, need: Any) -> None:
        before = sum(self._trees.num_pages)
        fit(self, need)
        print(f"evicted pages: {before - sum(self._trees.num_pages)}", flush=True)

    Eviction.to_fit = fitted
    for name in ("zero", "copy"):
        work = getattr(ops.InterpretedOps, name)

        def said(self: Any, *args: Any, work: Any = work, name: str = name) -> None:
            print(f"kernel: {name}", flush=True)
            work(self, *args)

        setattr(ops.InterpretedOps, name, said)


def served(family: str, page_size: int, model: Path) -> tuple[Run, Run]:
    """Stock SGLang's run and jenga's."""
    common = {"max_new_tokens": NEW_TOKENS, "seconds": 900, "attention_backend": "triton"}
    waves = [prompts(), goes_back if family in WINDOW_FAMILIES else goes_on]
    stock = run_engine(
        model,
        waves,
        env=EXACT,
        **{"max_total_tokens": 16384, **common, **FULL_KV.get(family, {})},
    )
    arguments: dict[str, Any] = {"page_size": page_size, "max_total_tokens": POOL_TOKENS}
    if family in STATE_FAMILIES:
        arguments["max_mamba_cache_size"] = POOL_TOKENS // TOKENS_PER_STATE
        arguments["mamba_radix_cache_strategy"] = "no_buffer"
        arguments["disable_overlap_schedule"] = True
    ours = run_engine(
        model,
        waves,
        env=STRICT | EXACT,
        prepare=tell,
        **{**common, **arguments},
        memory_backend="jenga",
        chunked_prefill_size=64,
    )
    return stock, ours


def cell(name: str, folder: Path) -> dict[str, Any]:
    """What came of one server, as plain data."""
    family, _, page_size = name.partition(":")
    start = time.monotonic()
    stock, ours = served(family, int(page_size or 1), model_of(family, folder))
    pairs = [
        pair
        for wave, other in zip(stock.outputs, ours.outputs, strict=True)
        for pair in zip(wave, other, strict=True)
    ]
    return {
        "cell": name,
        "answers": len(pairs),
        "differing": sum(theirs != mine for theirs, mine in pairs),
        "hit_tokens": ours.hit_tokens,
        "evicted_pages": sum(map(int, re.findall(r"evicted pages: (\d+)", ours.log))),
        "retractions": ours.retractions,
        "zeroings": ours.log.count("kernel: zero"),
        "copies": ours.log.count("kernel: copy"),
        "seconds": round(time.monotonic() - start),
    }


def main(argv: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("start this with TRITON_INTERPRET=1 in the environment", file=sys.stderr)
        return 2
    good = True
    with tempfile.TemporaryDirectory(prefix="interpreted-") as folder:
        for name in argv or CELLS:
            found = cell(name, Path(folder))
            print(json.dumps(found), flush=True)
            good &= not found["differing"] and found["evicted_pages"] > 0
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
