"""Servers whose Triton kernels run in Triton's interpreter answer as stock SGLang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import interpreted

ROOT = Path(__file__).resolve().parents[2]
# One of each mix; `python -m tests.servers.interpreted` runs the others too.
MIXES = ("llama:16", "gemma3_text:1", "qwen3_next:1", "jet_nemotron:1")


@pytest.mark.slow
@pytest.mark.parametrize("cell", MIXES)
def test_tokens_are_those_of_stock_sglang(cell: str):
    assert cell in interpreted.CELLS
    run = subprocess.run(
        [sys.executable, "-m", "tests.servers.interpreted", cell],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert (found["answers"], found["differing"]) == (9, 0)
    assert found["evicted_pages"] > 0
    # So small a pool keeps no state to hit; but states were copied there, by our kernels.
    states = cell.startswith(("qwen3_next", "jet_nemotron"))
    assert (found["zeroings"] > 0, found["copies"] > 0) == (states, states)
    assert states or found["hit_tokens"] > 0


def test_without_the_interpreter_it_says_how_to_start_it(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    assert interpreted.main([]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
