"""Several tools called in parallel on one question; their results are joined for the answer.

    python -m sglang.launch_server --model-path MODEL --memory-backend jenga
    python examples/parallel_tools.py --base-url http://127.0.0.1:30000

`fork` gives every tool a branch of its own behind the shared instructions and question. `join`
brings their variables back as lists, one entry per branch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import sglang as sgl

QUESTION = "Is it warm enough in Lisbon to swim at noon, and what does the tram to the beach cost?"


def weather(city: str) -> str:
    return f"{city or 'everywhere'}: 24 degrees, light wind"


def timetable(line: str) -> str:
    return f"line {line or '15'}: every 12 minutes, 3.10 euros"


def beaches(place: str) -> str:
    return f"near {place or 'here'}: two beaches, water at 19 degrees"


TOOLS: dict[str, Callable[[str], str]] = {
    "weather": weather,
    "timetable": timetable,
    "beaches": beaches,
}
INSTRUCTIONS = f"""Answer questions of travellers with the help of tools.
The tools are {", ".join(TOOLS)}. Every tool takes one short argument and returns one line.
First say for each tool what to ask it, then read what it returned, then answer.

"""


class Answer(NamedTuple):
    """A tool's call with its result, or the final answer; the tokens before what the model wrote,
    and how many of those were cached."""

    text: str
    prompt_tokens: int
    cached_tokens: int


@sgl.function
def ask(s, question: str):
    """Return the branches; `argument`, `needed` and `result` are lists in `s` afterwards."""
    s += INSTRUCTIONS
    s += f"Question: {question}\n"
    s.sync()  # fork has the server compute the text so far once, but only what is written by then
    branches = s.fork(len(TOOLS))
    # Submitted to every branch before any is read: they are generated at the same time.
    for name, branch in zip(TOOLS, branches.states, strict=True):
        branch += f"Ask {name}: " + sgl.gen("argument", stop="\n")
        branch += "\nIs the result needed? " + sgl.select("needed", choices=["yes", "no"])
    for name, branch in zip(TOOLS, branches.states, strict=True):
        branch["result"] = TOOLS[name](branch["argument"].strip())
    branches.join()
    for name, needed, result in zip(TOOLS, s["needed"], s["result"], strict=True):
        if needed == "yes":
            s += f"{name} says: {result}\n"
    s += "Answer: " + sgl.gen("answer", stop="\n")
    return branches.states


def run(
    backend: sgl.RuntimeEndpoint,
    question: str = QUESTION,
    *,
    max_tokens: int = 32,
) -> list[Answer]:
    """Return one entry per tool, in the order of `TOOLS`, and then the answer to `question`."""
    state = ask.run(question=question, backend=backend, temperature=0, max_new_tokens=max_tokens)
    answers = []
    for name, branch in zip(TOOLS, state.ret_value, strict=True):
        meta = branch.get_meta_info("argument")
        text = f"{name}({branch['argument'].strip()!r}) = {branch['result']!r}"
        text += f", needed: {branch['needed']}"
        answers.append(Answer(text, meta["prompt_tokens"], meta["cached_tokens"]))
    meta = state.get_meta_info("answer")
    answers.append(Answer(state["answer"], meta["prompt_tokens"], meta["cached_tokens"]))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    print(QUESTION)
    for answer in run(sgl.RuntimeEndpoint(options.base_url), max_tokens=options.max_tokens):
        print(f"{answer.text.strip()}")
        print(f"    [{answer.cached_tokens} of {answer.prompt_tokens} tokens cached]")


if __name__ == "__main__":
    main()
