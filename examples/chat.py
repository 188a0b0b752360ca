"""A chat of several turns, in SGLang's frontend language, against a running server.

    python -m sglang.launch_server --model-path MODEL --memory-backend jenga
    python examples/chat.py --base-url http://127.0.0.1:30000

Every turn sends the whole conversation again. What the server still holds of it is not computed
again, so the cached tokens grow with the conversation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import sglang as sgl

SYSTEM = "You are a guide in a natural history museum. Answer in one or two plain sentences."
QUESTIONS = (
    "Which animal in this hall is the oldest?",
    "How do you know how old it is?",
    "What did it eat?",
    "Which living animals are its closest relatives?",
)


class Answer(NamedTuple):
    """What the model said, the tokens before it, and how many of those were cached."""

    text: str
    prompt_tokens: int
    cached_tokens: int


@sgl.function
def chat(s, system: str, questions: Sequence[str]):
    s += sgl.system(system)
    for turn, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer_{turn}"))


def run(
    backend: sgl.RuntimeEndpoint,
    questions: Sequence[str] = QUESTIONS,
    *,
    system: str = SYSTEM,
    max_tokens: int = 64,
) -> list[Answer]:
    """Ask `questions` one after the other in one conversation; return its answers in order."""
    state = chat.run(
        system=system,
        questions=questions,
        backend=backend,
        temperature=0,
        max_new_tokens=max_tokens,
    )
    return [_answer(state, f"answer_{turn}") for turn in range(len(questions))]


def _answer(state, name: str) -> Answer:
    text, meta = state[name], state.get_meta_info(name)
    return Answer(text, meta["prompt_tokens"], meta["cached_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    answers = run(sgl.RuntimeEndpoint(options.base_url), max_tokens=options.max_tokens)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"user       {question}\nassistant  {answer.text.strip()}")
        print(f"           [{answer.cached_tokens} of {answer.prompt_tokens} tokens cached]\n")


if __name__ == "__main__":
    main()
