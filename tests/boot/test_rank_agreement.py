"""What ranks tell each other before they build a pool: whatever would make them go apart."""

from __future__ import annotations

import pytest

from sglang_jenga.serving.ranks import differences
from sglang_jenga.testing.tiny_models import write_tiny_model

DIGEST = """
import os
os.environ.update({env!r})
from sglang_jenga.boot.geometry import geometry_of, plan_for
from sglang_jenga.boot.rank_agreement import digest
from sglang_jenga.testing.built_pools import configurator
given = {{"window": 31, "memory_backend": "jenga", **{arguments!r}}}
with configurator({model!r}, {budget}, **given) as made:
    answer = digest(plan_for(geometry_of(made), {budget}), {requests})
"""
BUDGET = 1 << 20


@pytest.fixture(scope="module")
def digest(launcher, tmp_path_factory):
    """What a rank says that serves a tiny Gemma-3."""
    model = str(write_tiny_model("gemma3_text", tmp_path_factory.mktemp("gemma3")))

    def digest(budget: int = BUDGET, requests: int = 32, env=None, **arguments):
        env = env or {}
        return launcher.run(
            DIGEST.format(
                model=model, budget=budget, requests=requests, env=env, arguments=arguments
            )
        )

    return digest


def test_ranks_of_one_command_line_agree(digest):
    assert differences({0: digest(), 1: digest()}) == ""


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"budget": 2 * BUDGET}, ["number of large pages"]),
        ({"requests": 31}, ["running requests"]),
        ({"page_size": 16}, ["page size", "large page bytes", "number of large pages"]),
        ({"disable_radix_cache": True}, ["radix cache"]),
        ({"chunked_prefill_size": 64}, ["tokens of a chunk", "mixed chunks"]),
        ({"env": {"SGLANG_JENGA_ABLATE": "shield"}}, ["parts switched off"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_differs_is_named(digest, other, names: list[str]):
    found = {0: digest(), 1: digest(**other)}

    assert [name for name in found[0] if found[0][name] != found[1][name]] == names
    line = differences(found)
    assert all(f"{name} ({found[0][name]} on rank 0; " in line for name in names)


def test_a_layer_type_is_named_with_the_class_of_its_policy(digest):
    assert digest()["layer types"] == (
        "full by sglang_jenga.layers.full and sglang_jenga.layers.full.FullPolicy, "
        "window(32) by sglang_jenga.layers.window and sglang_jenga.layers.window.WindowPolicy"
    )
