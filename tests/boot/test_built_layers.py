"""What SGLang has built is what the pool is cut for, or the server stops in one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from sglang_jenga.boot.built_layers import BuiltLayer, differences
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window, WindowPolicy
from sglang_jenga.memory.buffer import HeadShape
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.launcher import environment
from sglang_jenga.testing.tiny_models import write_tiny_model

FULL, SMALL = HeadShape(2, 16, 16), HeadShape(4, 16, 16)
GROUPS = (LayerGroup(Full(), (1, 3), 128), LayerGroup(Window(32), (0, 2), 128))
BUILT = (
    BuiltLayer(0, SMALL, 32),
    BuiltLayer(1, FULL, None),
    BuiltLayer(2, SMALL, 32),
    BuiltLayer(3, FULL, None),
)


def with_layer(number, **change):
    return [*BUILT[:number], BUILT[number]._replace(**change), *BUILT[number + 1 :]]


@pytest.mark.parametrize(
    "layers",
    [
        BUILT,
        # Two layers that share the KV of a third, and a layer that nobody has.
        [*BUILT[:3], BUILT[2]],
        # A full group holds all that a window layer could see.
        with_layer(1, sees=32),
        # A kernel that knows its chunks.
        with_layer(0, sees=None, chunk=32),
    ],
)
def test_layers_as_planned_are_served(layers):
    assert differences(layers, GROUPS, (FULL, SMALL), 32) == []


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        (with_layer(0, layer_id=4), "layer 4 is in no group"),
        (with_layer(0, sees=None), "layer 0 sees all tokens, its group is window(32)"),
        (
            with_layer(2, sees=33),
            "layer 2 sees 33 tokens, its group is window(32): "
            "the token at 32 reads the one at 0, which is given back by then",
        ),
        (
            with_layer(2, sees=None, chunk=64),
            "layer 2 has chunks of 64, its group is window(32): "
            "the token at 32 reads the one at 0, which is given back by then",
        ),
        (with_layer(2, sees=31), "layer 2 sees 31 tokens, 32 by the table of models"),
        (
            with_layer(3, heads=SMALL),
            "layer 3 has 4 KV heads of 16 and 16, its group 2 KV heads of 16 and 16",
        ),
    ],
)
def test_a_layer_built_otherwise_is_named(layers, line):
    assert differences(layers, GROUPS, (FULL, SMALL), 32) == [line]


WINDOWS_ALONE = (LayerGroup(Full(), (), 64), LayerGroup(Window(32), (0, 2), 128))


def test_of_windows_alone_every_layer_must_have_one():
    layers = [BUILT[0], BUILT[2]]
    assert differences(layers, WINDOWS_ALONE, (FULL, SMALL), 32) == []
    assert differences([BUILT[0], BUILT[3]], WINDOWS_ALONE, (FULL, SMALL), 32) == [
        "layer 3 is in no group"
    ]


def of_kind(kind):
    return (GROUPS[0], LayerGroup(kind, (0, 2), 128))


def test_a_window_layer_reads_what_a_chunked_group_gives_back():
    """As wide as each other, and not the same."""
    assert differences(BUILT, of_kind(Chunked(32)), (FULL, SMALL), 32) == [
        f"layer {number} sees 32 tokens, its group is chunked(32): "
        "the token at 32 reads the one at 1, which is given back by then"
        for number in (0, 2)
    ]


def test_a_layer_that_keeps_to_its_chunks_is_served_by_a_group_of_them():
    layers = [layer._replace(sees=None, chunk=32) for layer in (BUILT[0], BUILT[2])]
    assert differences(layers, of_kind(Chunked(32)), (FULL, SMALL), None) == []


@dataclass(frozen=True, slots=True)
class Forgetful(Window):
    """Keeps all of its window for a request, and half of it in the cache."""

    name = "forgetful"

    @property
    def policy(self):
        return WindowPolicy(self.width // 2)


def test_a_layer_reads_what_its_group_does_not_keep_in_the_cache():
    found = differences(BUILT[:1], of_kind(Forgetful(32)), (FULL, SMALL), 32)
    assert found == [
        "layer 0 sees 32 tokens, its group is forgetful(32): "
        "the token at 17 reads the one at 0, which is not kept in the cache"
    ]


def test_without_a_row_a_window_may_be_shorter_than_its_group():
    assert differences(with_layer(2, sees=31), GROUPS, (FULL, SMALL), None) == []


# Read again by the scheduler, as the main module of the process that starts it.
SERVER = """
import runpy
import sys
from dataclasses import replace

from sglang_jenga.plan import layer_lists, layer_rules

WRONG = [layer_lists.FULL, *[layer_lists.WINDOW] * 5]
right = layer_rules.MODELS["Gemma3ForCausalLM"]
layer_rules.MODELS["Gemma3ForCausalLM"] = replace(right, layers=lambda read: WRONG)

if __name__ == "__main__":
    sys.argv[0] = "launch_server"
    runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.mark.slow
def test_a_wrong_row_stops_the_server_before_it_serves(tmp_path):
    model = write_tiny_model("gemma3_text", tmp_path / "model", num_layers=6)
    script = tmp_path / "serve.py"
    script.write_text(SERVER)
    flags = "--memory-backend jenga --device cpu --max-total-tokens 2048 --log-level error"

    done = subprocess.run(
        [sys.executable, str(script), "--model-path", str(model), *flags.split()],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "sglang-jenga: --memory-backend jenga: SGLang built Gemma3ForCausalLM otherwise than "
        "planned: layer 5 sees all tokens, its group is window(64); drop --memory-backend"
    )
