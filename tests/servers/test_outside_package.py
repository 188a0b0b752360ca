"""A package that this project knows nothing of adds a layer type and a model, and is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_jenga.testing.cpu_engine import CPU_ENV, ROOT
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model

PACKAGE = ROOT / "examples" / "sink_window"
WINDOW = 32
PROMPTS = [
    [(7 * index + 3 * at) % (VOCAB_SIZE - 3) + 3 for at in range(40 + 30 * index)]
    for index in range(4)
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package in it, beside which this project is installed."""
    folder = tmp_path_factory.mktemp("packages")
    source = tmp_path_factory.mktemp("source") / "sink_window"
    subprocess.run(["cp", "-r", PACKAGE, source], check=True)  # setuptools builds beside the code
    build = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *build, folder, source], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Gemma-3 whose config names the package's architecture."""
    folder = write_tiny_model(
        "gemma3_text", tmp_path_factory.mktemp("model"), num_layers=6, window=WINDOW
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["SinkGemmaForCausalLM"]}))
    return folder


def test_the_packages_own_tests_pass_where_it_is_installed(installed):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, PACKAGE / "tests"],
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        cwd=installed,
    )

    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def plan(model: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sglang_jenga.plan.cli", "plan", str(model), "--pool-gib", "0.01"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_plan_has_groups_of_the_types_that_a_package_adds(installed, model):
    planned = plan(model, PYTHONPATH=str(installed))

    assert planned.returncode == 0, planned.stderr
    assert f"sink_window({WINDOW})" in planned.stdout
    assert "served: yes" in planned.stdout


def test_without_the_package_its_model_is_one_of_full_layers(model):
    planned = plan(model)

    assert "sink_window" not in planned.stdout
    assert planned.stdout.count("window(") == 0


def test_a_package_that_cannot_register_is_named_in_one_line(tmp_path, model):
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[sglang_jenga.layers]\nx = no_such_module:f\n")

    planned = plan(model, PYTHONPATH=str(tmp_path))

    assert planned.returncode == 2
    assert planned.stderr == (
        "sglang-jenga: the layer types of no_such_module:f could not be registered: "
        "ModuleNotFoundError: No module named 'no_such_module'; mend that package or remove it\n"
    )


def answers(model: Path, installed: Path, *flags: str) -> tuple[list[list[int]], list[int], str]:
    """Token ids of two rounds, cached tokens of the second, and the log."""
    env = CPU_ENV | {
        "PYTHONPATH": str(installed),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "sink_window.models",
    }
    with Server(model, "--disable-overlap-schedule", *flags, env=env) as server:
        first = server.generate(PROMPTS, max_new_tokens=60)
        longer = [prompt + answer.output_ids for prompt, answer in zip(PROMPTS, first, strict=True)]
        second = server.generate(longer, max_new_tokens=20)
        log = server.log()
    ids = [answer.output_ids for answer in (*first, *second)]
    return ids, [answer.cached_tokens for answer in second], log


@pytest.mark.slow
def test_a_model_with_layers_of_a_type_of_its_own_answers_as_in_stock_sglang(installed, model):
    expected, _, _ = answers(model, installed)

    # So few tokens that windows must be given back for the next request to run.
    found, cached, log = answers(
        model, installed, "--memory-backend", "jenga", "--max-total-tokens", "260"
    )

    assert f"sink_window({WINDOW})" in log
    assert found == expected
    assert sum(cached) > 0
