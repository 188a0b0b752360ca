"""Servers in a few seconds: one process imports SGLang once, and every server is a fork of it.

    with WarmLauncher() as warm, Server(model, launcher=warm) as server: ...

A stock boot is 20 s of imports, once in the launcher and again in each process that it spawns. Here
those are forks too. Apart from that it is `python -m sglang.launch_server`, plugins included, but
it is not how a user starts a server: keep at least one test on the ordinary way. CPU engine only.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from sglang_jenga.testing.cpu_engine import CPU_ENV, ROOT


class Forked:
    """The part of `subprocess.Popen` that `Server` uses, for a process that is not our child."""

    returncode = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            self.returncode = -1  # the real one went to the process that forked it
        return self.returncode

    def wait(self) -> None:
        """Its parent reaps it."""


class WarmLauncher:
    """Context manager around the process that forks; entering it costs the imports once."""

    def __init__(self, env: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__))],
            env=os.environ | CPU_ENV | (env or {}),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> WarmLauncher:
        return self

    def __exit__(self, *exc) -> None:
        self._process.stdin.close()  # its loop ends; servers still running are their owners'
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def start(self, arguments: list[str], env: dict[str, str], log: Path) -> Forked:
        """Fork a server with the arguments of `sglang.launch_server`, writing to `log`."""
        order = {"arguments": arguments, "env": env, "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the warm launcher died with {self._process.wait()}")
        return Forked(int(answer))


@functools.cache
def shared_warm_launcher() -> WarmLauncher:
    """Return the one launcher of this test run."""
    launcher = WarmLauncher()
    atexit.register(launcher.__exit__)
    return launcher


def main() -> None:
    """Import, then fork one server per line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import gc
    import multiprocessing

    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    import sglang_jenga.boot.construction  # noqa: F401  inert without the flag

    gc.collect()
    gc.freeze()  # SGLang collects garbage as it boots
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang forces spawn
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the servers
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _serve(order)
        answers.write(f"{pid}\n")
        answers.flush()
    os._exit(0)  # nothing to clean up, and finalising all those modules takes seconds


def _serve(order: dict) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.environ.update(order["env"])
    sys.argv = ["sglang.launch_server", *order["arguments"]]
    status = 1
    try:
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        run_server(prepare_server_args(order["arguments"]))
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
