"""The refusal is the last line of a real process, and no process goes on behind one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_jenga.testing.launcher import environment
from tests.boot.lines import WITH


def run_python(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], env=environment(**env), capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "sglang.launch_server", "--model-path"),
        ("-c", "from sglang.cli.main import main; main()", "serve"),
    ],
)
def test_real_launcher_stops_with_the_line_and_no_trace(llama, command):
    done = run_python(*command, llama, "--enable-lmcache", SGLANG_MEMORY_BACKEND="jenga")

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{WITH}--enable-lmcache: ")
    assert "Traceback" not in done.stderr


OTHER_VERSION = """
import runpy, sys, sglang.version
sglang.version.__version__ = "0.5.24"
sys.argv = ["launch_server", *sys.argv[1:]]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.mark.slow
def test_other_sglang_version_stops_under_the_flag(llama):
    done = run_python("-c", OTHER_VERSION, "--model-path", llama, "--memory-backend", "jenga")

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "sglang-jenga: --memory-backend jenga cannot start: sglang-jenga 0.1.0 works with "
        "SGLang >=0.5.23,<0.5.24 only, and this is SGLang 0.5.24"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_other_sglang_version_only_warns_without_the_flag():
    done = run_python("-c", OTHER_VERSION, "--help")

    assert done.returncode == 0
    assert "works with SGLang >=0.5.23,<0.5.24 only" in done.stderr


CHILD = """
import base64, json, pickle, sys
server_args = pickle.loads(base64.b64decode(sys.stdin.read()))
import sglang.version
sglang.version.__version__ = json.loads(sys.argv[1]) or sglang.version.__version__
from sglang.srt.plugins import load_plugins
from sglang.srt import runtime_context
load_plugins()
print(server_args._jenga_refusal, flush=True)
runtime_context.publish(server_args, role="scheduler")
print("published")
from sglang.srt.mem_cache.registry import create_tree_cache
create_tree_cache(None)
"""


def run_child(launcher, llama, version: str | None = None, **env: str):
    """Receive a record as a scheduler process does."""
    record = launcher.engine(model_path=llama, memory_backend="jenga").fields["pickle"]
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(version)],
        env=environment(**env),
        input=record,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_child_without_the_plugin_stops_at_the_unknown_radix_cache(launcher, llama):
    done = run_child(launcher, llama, SGLANG_PLUGINS="another")

    assert done.returncode == 1
    assert "--radix-cache-backend='jenga' is not registered" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_child_with_a_broken_plugin_stops_before_anything_is_built(launcher, llama):
    done = run_child(launcher, llama, version="0.5.24")

    assert done.returncode == 1
    (place,) = done.stdout.splitlines()  # not "published"
    assert Path(place).read_text().endswith("and this is SGLang 0.5.24")
    os.unlink(place)
