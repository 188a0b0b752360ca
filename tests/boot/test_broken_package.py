"""An installed package of layer types that fails: nothing without the flag, one line with it."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.launcher import Launcher

SAID = (
    "sglang-jenga: --memory-backend jenga cannot start: the layer types of broken_types:register "
    "could not be registered: RuntimeError: two lines; mend that package or remove it"
)


@pytest.fixture(scope="module")
def beside_broken(tmp_path_factory):
    """A launcher with such a package on its path."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "broken_types.py").write_text(
        "imported = True\ndef register():\n    raise RuntimeError('two\\nlines')\n"
    )
    info = folder / "broken_types-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-types\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang_jenga.layers]\nx = broken_types:register\n")
    launcher = Launcher(PYTHONPATH=str(folder))
    yield launcher
    launcher.close()


LOADED = """
import sys
from sglang_jenga import plugin
answer = {"error": plugin.LOAD_ERROR, "imported": "broken_types" in sys.modules}
"""


def test_without_the_flag_a_broken_package_is_not_even_imported(beside_broken, llama):
    outcome = beside_broken.command_line("--model-path", llama)

    assert (outcome.end, outcome.fields["backend"]) == ("resolved", "default")
    assert beside_broken.run(LOADED) == {"error": None, "imported": False}


def test_with_the_flag_a_broken_package_is_named_in_one_line_each_time(beside_broken, llama):
    for _ in range(2):
        outcome = beside_broken.command_line("--model-path", llama, "--memory-backend", "jenga")

        assert outcome[:2] == ("SystemExit", SAID)
