"""A tree of thoughts: fork the state at every step, keep the branches that look best.

    python -m sglang.launch_server --model-path MODEL --memory-backend jenga
    python examples/tree_of_thought.py --base-url http://127.0.0.1:30000

All branches of a node share everything above it, which the server holds once. Abandoned branches
are evicted when their memory is needed; the trunk, used by all, stays.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import sglang as sgl

PROBLEM = (
    "A farmer has a wolf, a goat and a cabbage, and a boat for himself and one of them. Alone, the "
    "wolf eats the goat and the goat eats the cabbage. How does he bring all three across?"
)
VERDICTS = ("sure", "likely", "hopeless")  # best first


class Answer(NamedTuple):
    """A kept branch from its first thought on, the tokens before its conclusion, and how many of
    those were cached."""

    text: str
    prompt_tokens: int
    cached_tokens: int


@sgl.function
def solve(s, problem: str, depth: int, breadth: int, kept: int):
    """Return the states of the `kept` best branches, each with its conclusion."""
    s += f"Solve the problem in {depth} steps. Judge every step: {', '.join(VERDICTS)}.\n"
    s += f"Problem: {problem}\n"
    s.sync()  # fork has the server compute the text so far once, but only what is written by then
    leaves = [s]
    for step in range(1, depth + 1):
        branches = [branch for leaf in leaves for branch in leaf.fork(breadth).states]
        # Submitted to every branch before any is read: they are generated at the same time.
        for index, branch in enumerate(branches):
            branch += f"Step {step}, idea {index % breadth + 1}: " + sgl.gen("thought", stop="\n")
            branch += "\nThis step is " + sgl.select("verdict", choices=list(VERDICTS)) + "\n"
        # sorted() keeps the order of equals, so the same verdicts keep the same branches.
        leaves = sorted(branches, key=lambda branch: VERDICTS.index(branch["verdict"]))[:kept]
    for leaf in leaves:
        leaf += "So the answer is: " + sgl.gen("conclusion", stop="\n")
    return leaves


def run(
    backend: sgl.RuntimeEndpoint,
    problem: str = PROBLEM,
    *,
    depth: int = 3,
    breadth: int = 3,
    kept: int = 2,
    max_tokens: int = 32,
) -> list[Answer]:
    """Grow a tree of `depth` levels; return its `kept` best branches, best first."""
    state = solve.run(
        problem=problem,
        depth=depth,
        breadth=breadth,
        kept=kept,
        backend=backend,
        temperature=0,
        max_new_tokens=max_tokens,
    )
    start = len(state.text())
    answers = []
    for leaf in state.ret_value:
        text, meta = leaf.text()[start:], leaf.get_meta_info("conclusion")
        answers.append(Answer(text, meta["prompt_tokens"], meta["cached_tokens"]))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--depth", type=int, default=3, help="steps of a branch")
    parser.add_argument("--breadth", type=int, default=3, help="ideas per step")
    parser.add_argument("--kept", type=int, default=2, help="branches that go on after a step")
    parser.add_argument("--max-tokens", type=int, default=32, help="per thought")
    options = vars(parser.parse_args())
    answers = run(sgl.RuntimeEndpoint(options.pop("base_url")), **options)
    print(PROBLEM)
    for answer in answers:
        print(f"\n{answer.text}")
        print(f"[{answer.cached_tokens} of {answer.prompt_tokens} tokens cached]")


if __name__ == "__main__":
    main()
