"""A prefill server and a decode server on this machine, with real bytes between them.

    with Pair(model, "--page-size", "16", launcher=launcher) as pair:
        answers = pair.generate(prompts, max_new_tokens=24)

Mooncake's engine is a stand-in (`stand_ins`), everything else is SGLang's own. A request goes to
both servers, as SGLang's router sends it: the prefill server computes the prompt, the decode server
answers.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import requests

from sglang_jenga.testing.cpu_engine import ROOT
from sglang_jenga.testing.servers import Server, free_port
from sglang_jenga.testing.warm import WarmLauncher
from tests.servers.ranks import COMPARED

STAND_INS = Path(__file__).parent / "stand_ins"
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
"""A page that is lost, or that two hold, ends the server."""


NOBODY_WAITS_LONG = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "30",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "30",
}
"""Seconds until a request whose prefill server has gone is given up; SGLang gives it 300."""


def launcher_with_stand_ins(env: Mapping[str, str] | None = None) -> WarmLauncher:
    paths = os.pathsep.join((str(STAND_INS), str(ROOT)))
    return WarmLauncher({"PYTHONPATH": paths, **(env or {})})


class Pair:
    """Context manager around the two servers; ``prefill`` and ``decode`` may be restarted.

    ``flags`` are those of both, ``*_flags`` those of one. A transfer takes ``seconds`` at least.
    ``decode_launcher``: of the decode server, if that is another.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        launcher: WarmLauncher,
        backend: str = "jenga",
        prefill_flags: Sequence[str] = (),
        decode_flags: Sequence[str] = (),
        decode_launcher: WarmLauncher | None = None,
        env: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.bootstrap_port = free_port()
        both = ("--memory-backend", backend, *flags)
        transfers = ("--disaggregation-bootstrap-port", str(self.bootstrap_port))

        def side(name: str, launcher: WarmLauncher, *own: str) -> Server:
            return Server(
                model,
                *both,
                *("--disaggregation-mode", name, *transfers),
                # Stock would choose a pool on the host, which takes CUDA.
                *("--disaggregation-decode-retraction-backup", "cpu_tensor"),
                *own,
                env={
                    **STRICT,
                    **COMPARED,
                    "JENGA_TEST_TRANSFER_SECONDS": str(seconds),
                    **(env or {}),
                },
                launcher=launcher,
            )

        self.prefill = side("prefill", launcher, *prefill_flags)
        self.decode = side("decode", decode_launcher or launcher, *decode_flags)
        self._rooms = itertools.count(1)

    def __enter__(self) -> Pair:
        with ExitStack() as stack:
            for server in (self.prefill, self.decode):
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self._stack.__exit__(*exc)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, concurrency: int = 32
    ) -> list[list[int]]:
        """Greedy answers, in order."""
        with ThreadPoolExecutor(concurrency) as threads:
            replies = list(threads.map(lambda p: self.ask(p, max_new_tokens), prompts))
        for reply in replies:
            assert reply.ok, f"{reply.status_code} {reply.text}\n{self.decode.log(40)}"
        return [reply.json()["output_ids"] for reply in replies]

    def ask(
        self, prompt: Sequence[int], max_new_tokens: int, rid: str | None = None
    ) -> requests.Response:
        """What the decode server says to a request that both have got; any status."""
        body = {
            "rid": rid,
            "input_ids": list(prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
            },
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": next(self._rooms),
        }

        def post(server: Server) -> requests.Response | None:
            try:
                return requests.post(f"{server.url}/generate", json=body, timeout=100)
            except requests.ConnectionError:  # it has been killed
                return None

        # Nobody waits for the prefill server: it may never hear of a request that went wrong.
        threading.Thread(target=post, args=(self.prefill,), daemon=True).start()
        reply = post(self.decode)
        assert reply is not None, self.decode.log(40)
        return reply

    def sent(self) -> int:
        """Bytes that the prefill server has written into the decode server's memory."""
        return sum(map(int, re.findall(r"stand-in: \d+ writes, (\d+) bytes", self.prefill.log())))

    def require_all_back(self) -> None:
        """Nothing is lost on either side: once both caches are flushed, the pools are empty."""
        for server in (self.prefill, self.decode):
            server.flush_cache()
            (*_, (left, of)) = re.findall(
                r"jenga flush: (\d+) of (\d+) large pages empty", server.log()
            )
            assert left == of
            assert server.alive()
