"""A pool that holds no request: one line, and before the model loads if that is known by then."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from sglang_jenga.testing.engines import EngineFailed, run_engine
from sglang_jenga.testing.launcher import environment
from sglang_jenga.testing.tiny_models import write_tiny_model

JENGA = ("--memory-backend", "jenga", "--attention-backend", "torch_native", "--model-path")
REST = (
    "a request of 16 tokens must fit beside a free page: raise --mem-fraction-static or "
    "--max-total-tokens"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model, by family."""
    return lambda family: str(write_tiny_model(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize(
    ("family", "flags", "needs"),
    [
        ("llama", "--max-total-tokens 3", "one request of 18 tokens needs 19 (full 19)"),
        ("llama", "--max-total-tokens 100 --page-size 64", "needs 3 (full 3)"),
        ("gemma3_text", "--max-total-tokens 5", "window(64) 18)"),
        # Its own state, and one or two that it is tracked in.
        ("qwen3_next", "--max-total-tokens 30 --max-mamba-cache-size 2", "state 2)"),
        (
            "qwen3_next",
            "--max-total-tokens 100 --max-mamba-cache-size 2 "
            "--mamba-radix-cache-strategy extra_buffer",
            "state 3)",
        ),
        (
            "qwen3_next",
            "--max-total-tokens 10 --max-mamba-cache-size 1 --mamba-radix-cache-strategy no_buffer",
            "state 1)",
        ),
        ("mamba", "--max-total-tokens 10 --max-mamba-cache-size 1", "state 1)"),
    ],
)
def test_pool_of_too_few_tokens_is_refused_before_any_process_starts(
    launcher, model, family, flags, needs
):
    outcome = launcher.command_line(*JENGA, model(family), *flags.split())

    assert outcome.end == "SystemExit", outcome
    assert outcome.text.startswith("sglang-jenga: --memory-backend jenga: pool of ")
    assert needs in outcome.text
    assert outcome.text.endswith(REST)
    assert "\n" not in outcome.text


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", "--max-total-tokens 18"),
        ("llama", "--max-total-tokens 128 --page-size 64"),
        ("gemma3_text", "--max-total-tokens 40"),
        ("qwen3_next", "--max-total-tokens 30 --max-mamba-cache-size 8"),
    ],
)
def test_pool_of_a_short_request_is_accepted(launcher, model, family, flags):
    outcome = launcher.command_line(*JENGA, model(family), *flags.split())

    assert outcome.end == "resolved", outcome.text


def test_token_limit_that_says_nothing_of_bytes_is_one_warning(launcher, model):
    found = launcher.warnings(*JENGA, model("mamba"), "--max-total-tokens", "500")

    assert found == [
        "--memory-backend jenga ignores --max-total-tokens: the model has no attention, so tokens "
        "take no bytes; limit its states by --max-mamba-cache-size"
    ]


# ---- known only once memory is profiled ------------------------------------------------------

THIEF = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def load():
    HookRegistry.register(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        lambda original, self, pre_model_load_memory: 2000,
        HookType.AROUND,
    )
"""


@pytest.fixture
def little_memory(tmp_path) -> dict[str, str]:
    """Environment with another SGLang plugin, after which 2,000 bytes are left for the pool."""
    about = tmp_path / "thief-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\nthief = thief:load\n")
    (tmp_path / "thief.py").write_text(THIEF)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    return environment(PYTHONPATH=path, TMPDIR=str(tmp_path))


LATE = "sglang-jenga: --memory-backend jenga: pool of 1.95 KiB holds "
CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
    *("--mem-fraction-static", "0.5", "--disable-cuda-graph", "--skip-tokenizer-init"),
)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["", "--dp-size 2"])
def test_server_ends_with_the_line_alone_if_too_little_memory_is_left(
    model, little_memory, tmp_path, ranks
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    argv = ("--model-path", model("llama"), "--memory-backend", "jenga", "--port", port)

    cores = "0|0" if ranks else "0"  # SGLang asks for them where ranks share a NUMA node

    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", *argv, *CPU, *ranks.split()],
        env=little_memory | {"SGLANG_CPU_OMP_THREADS_BIND": cores},
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(LATE)
    assert last.endswith(REST)
    assert done.stderr.count(LATE) == 1
    assert not list(tmp_path.glob("sglang-jenga-refusal-*"))


@pytest.mark.slow
def test_caller_of_an_engine_gets_the_late_line_as_a_value_error(model):
    def steal():
        from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

        KVCacheConfigurator._profile_available_bytes = lambda self, pre_model_load_memory: 2000

    with pytest.raises(EngineFailed, match=r"flags\.Refused: --memory-backend jenga: pool of 1.95"):
        run_engine(
            model("llama"), [[[5]]], prepare=steal, memory_backend="jenga", max_total_tokens=None
        )
