"""Greedy answers of Transformers' own model code: the reference where SGLang's is not one.

    python -m tests.models.transformers_greedy FOLDER COUNT < prompts.json

A process of its own: engines are forked from the one that runs the tests, which must not have
started torch's threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def greedy(model: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` tokens of each prompt, by eager attention over the whole text every time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.transformers_greedy", str(model), str(count)],
        cwd=ROOT,
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, count: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    answers = []
    with torch.no_grad():
        for prompt in json.load(sys.stdin):
            tokens = list(prompt)
            for _ in range(int(count)):
                logits = model(torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
            answers.append(tokens[len(prompt) :])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
