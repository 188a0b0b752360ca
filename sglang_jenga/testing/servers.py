"""A real SGLang server for tests: started on a free port, killed with everything it started.

    with Server(model, "--page-size", "16") as server:
        for answer in server.generate([[5, 6, 7], [8, 9]], max_new_tokens=8):
            print(answer.output_ids, answer.cached_tokens)

Greedy, ids in and ids out. Without a GPU the server runs on SGLang's CPU engine. A boot is some
25 s, nearly all imports: share a server between prompts, or start it from a `WarmLauncher`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from sglang_jenga.testing.cpu_engine import CPU_ENV, ROOT
from sglang_jenga.testing.engines import Pictured
from sglang_jenga.testing.warm import Forked, WarmLauncher

CPU_FLAGS = (
    ("--device", "cpu"),
    ("--attention-backend", "torch_native"),
    ("--dtype", "float32"),
    ("--max-total-tokens", "4096"),
    ("--max-running-requests", "32"),
    ("--skip-server-warmup",),
    ("--sleep-on-idle",),  # the idle loop would take a core from the others
)
# Stock refuses torch_native for Gemma-4 by name; without Intel AMX this one falls back to it.
FAMILY_FLAGS = {"gemma4": ("--attention-backend", "intel_amx")}
BOOT_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt got; `meta` is SGLang's `meta_info`."""

    output_ids: list[int]
    meta: dict = field(repr=False)

    @property
    def cached_tokens(self) -> int:
        return self.meta["cached_tokens"]


class ServerFailed(RuntimeError):
    """The server died or did not answer in time; the message ends with its log."""


def with_defaults(flags: Sequence[str], defaults: Sequence[tuple[str, ...]]) -> list[str]:
    """Return `flags` preceded by those defaults they do not name themselves."""
    given = {flag.split("=", 1)[0] for flag in flags}
    kept = [part for default in defaults if default[0] not in given for part in default]
    return [*kept, *flags]


class Server:
    """Context manager around `python -m sglang.launch_server`.

    `flags` win over the defaults of the same name. With `gpu=True` there are no defaults.
    `launcher` forks the server from a process that has its imports done.
    """

    module = "sglang.launch_server"
    ready_path = "/health"

    def __init__(
        self,
        model: str | Path,
        *flags: str,
        env: dict[str, str] | None = None,
        gpu: bool = False,
        launcher: WarmLauncher | None = None,
        boot_seconds: float = BOOT_SECONDS,
    ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.boot_seconds = boot_seconds
        self.arguments = [
            *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *with_defaults(flags, () if gpu else CPU_FLAGS),
        ]
        self.env = ({} if gpu else CPU_ENV) | (env or {})
        self.launcher = launcher
        self.process: subprocess.Popen | Forked | None = None
        self._session = requests.Session()

    def __enter__(self) -> Server:
        descriptor, name = tempfile.mkstemp(prefix="sglang-", suffix=".log")
        os.close(descriptor)
        self.log_path = Path(name)
        start = time.monotonic()
        if self.launcher is None:
            self.process = self._spawn()
        else:
            self.process = self.launcher.start(self.arguments, self.env, self.log_path)
        try:
            self._wait_until_healthy(start + self.boot_seconds)
        except BaseException:
            self.__exit__()
            raise
        self.boot_took = time.monotonic() - start
        return self

    def _spawn(self) -> subprocess.Popen:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                env=os.environ | self.env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one group holds the scheduler and the detokenizer too
            )

    def __exit__(self, *exc) -> None:
        if self.process is None:
            return
        self._session.close()
        for number, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
            if not _signal_group(self.process.pid, number):
                break
            _wait_for_group(self.process, seconds)
        self.process.wait()
        self.process = None
        if exc and exc[0] is None:
            self.log_path.unlink(missing_ok=True)  # after a failure it stays, to be read

    def log(self, last_lines: int | None = None) -> str:
        """The server's output so far, or the end of it."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines if last_lines is None else lines[-last_lines:])

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def get(self, path: str, **kwargs) -> requests.Response:
        return self._checked(self._session.get(self.url + path, timeout=60, **kwargs))

    def post(self, path: str, body: dict | None = None, *, timeout: float = 300.0):
        # A session per call: generate() calls from several threads.
        return self._checked(requests.post(self.url + path, json=body, timeout=timeout))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Pictured],
        max_new_tokens: int = 16,
        *,
        concurrency: int | None = None,
        **sampling,
    ) -> list[Answer]:
        """Answer every prompt greedily, in order; at most `concurrency` at a time (None: all)."""
        if not prompts:
            return []
        with ThreadPoolExecutor(concurrency or len(prompts)) as threads:
            return list(threads.map(lambda p: self._one(p, max_new_tokens, sampling), prompts))

    def _one(
        self, prompt: str | Sequence[int] | Pictured, max_new_tokens: int, sampling: dict
    ) -> Answer:
        given: dict[str, Any]
        if isinstance(prompt, Pictured):
            given = {"text": prompt.text, "image_data": list(prompt.images) or None}
        elif isinstance(prompt, str):
            given = {"text": prompt}
        else:
            given = {"input_ids": list(prompt)}
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = given | {"sampling_params": params | sampling}
        reply = self.post("/generate", body).json()
        return Answer(reply["output_ids"], reply["meta_info"])

    def flush_cache(self, seconds: float = 30.0) -> None:
        """Empty the prefix cache; SGLang refuses while anything runs, so ask until it agrees."""
        deadline = time.monotonic() + seconds
        while True:
            reply = requests.post(self.url + "/flush_cache", timeout=60)
            if reply.ok or time.monotonic() > deadline:
                self._checked(reply)
                return
            time.sleep(0.1)

    def server_info(self) -> dict:
        return self.get("/server_info").json()

    def loads(self) -> dict:
        """Running and waiting requests and token usage, as SGLang reports them."""
        return self.get("/v1/loads").json()

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by `name{labels}`; needs `--enable-metrics`."""
        samples = {}
        for line in self.get("/metrics/").text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                samples[name] = float(value)
        return samples

    def _checked(self, reply: requests.Response) -> requests.Response:
        if not reply.ok:
            raise ServerFailed(f"{reply.url}: {reply.status_code} {reply.text}\n{self.log(40)}")
        return reply

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.alive():
                code = self.process.returncode
                raise ServerFailed(f"the server exited with {code}\n{self.log(60)}")
            try:
                if requests.get(self.url + self.ready_path, timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.1)
        raise ServerFailed(f"not healthy in {self.boot_seconds:.0f} s\n{self.log(60)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_group(leader: subprocess.Popen | Forked, seconds: float) -> None:
    """Return when the whole group is gone: a scheduler may outlive the process it came from."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        leader.poll()  # reap, or the dead leader keeps the group alive
        if not _signal_group(leader.pid, 0):
            return
        time.sleep(0.05)
