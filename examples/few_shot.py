"""Several questions behind the same worked examples, all at once.

    python -m sglang.launch_server --model-path MODEL --memory-backend jenga
    python examples/few_shot.py --base-url http://127.0.0.1:30000

The frontend finds what the prompts have in common and has the server compute it once; each question
then costs its own few tokens. `select` takes the likeliest of the given words, so the label is
always one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import sglang as sgl

TEAMS = ("billing", "shipping", "repairs")
EXAMPLES = """Sort messages of customers by the team that should answer them.

Message: I was charged twice for one order.
Why: a wrong charge is about money
Team: billing

Message: The parcel says delivered, but nothing came.
Why: the parcel is lost on its way
Team: shipping

Message: The left speaker hums since yesterday.
Why: the device is broken
Team: repairs

"""
MESSAGES = (
    "The invoice has the wrong address on it.",
    "The screen stays black when I press the button.",
    "Can you send it to my office instead?",
    "My voucher was not taken off the price.",
    "It has been stuck in customs for a week.",
    "The battery lasts ten minutes.",
)


class Answer(NamedTuple):
    """Reason and label, the tokens before them, and how many of those were cached."""

    text: str
    prompt_tokens: int
    cached_tokens: int


@sgl.function
def sort_message(s, message: str):
    s += EXAMPLES
    s += f"Message: {message}\nWhy: "
    s += sgl.gen("reason", stop="\n")
    s += "\nTeam: "
    s += sgl.select("team", choices=list(TEAMS))


def run(
    backend: sgl.RuntimeEndpoint,
    messages: Sequence[str] = MESSAGES,
    *,
    max_tokens: int = 24,
) -> list[Answer]:
    """Sort `messages` in parallel; return "team: reason" for each, in order."""
    states = sort_message.run_batch(
        [{"message": message} for message in messages],
        backend=backend,
        temperature=0,
        max_new_tokens=max_tokens,
    )
    answers = []
    for state in states:
        meta = state.get_meta_info("reason")
        text = f"{state['team']}: {state['reason'].strip()}"
        answers.append(Answer(text, meta["prompt_tokens"], meta["cached_tokens"]))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    answers = run(sgl.RuntimeEndpoint(options.base_url), max_tokens=options.max_tokens)
    for message, answer in zip(MESSAGES, answers, strict=True):
        print(f"{message}\n    {answer.text}")
        print(f"    [{answer.cached_tokens} of {answer.prompt_tokens} tokens cached]")


if __name__ == "__main__":
    main()
