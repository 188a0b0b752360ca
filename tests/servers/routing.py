"""The commands of docs/operations.md that put workers behind `sglang-router`, and how they run."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from sglang_jenga.testing.cpu_engine import ROOT
from sglang_jenga.testing.servers import Server, free_port
from sglang_jenga.testing.warm import shared_warm_launcher

PAGE = ROOT / "docs" / "operations.md"
WORKER = ["python", "-m", "sglang.launch_server"]
ROUTER = ["python", "-m", "sglang_router.launch_router"]


def commands(heading: str) -> list[list[str]]:
    """Those that stand below a heading of the page, before the next one."""
    _, _, section = PAGE.read_text().partition(f"# {heading}\n")
    block = re.search(r"^```\n(.*?)^```$", section.partition("\n#")[0], re.M | re.S)
    assert block, f"{PAGE} has no commands below {heading!r}"
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


def worker(command: Sequence[str], model: Path, *more: str) -> Server:
    """A command's server, on another port and, without a GPU, on the CPU engine."""
    assert command[:3] == WORKER, command
    flags = without(command[3:], "--model-path", "--host", "--port")
    return Server(model, *flags, *more, launcher=shared_warm_launcher())


def without(flags: Sequence[str], *names: str) -> list[str]:
    """The flags but for some that have one value each."""
    kept = list(flags)
    for name in names:
        at = kept.index(name)
        del kept[at : at + 2]
    return kept


class Router(Server):
    """A command's router before these servers, on other ports; it answers what they answer."""

    module = ROUTER[-1]
    ready_path = "/readiness"

    def __init__(self, command: Sequence[str], workers: Sequence[Server], *more: str):
        assert command[:3] == ROUTER, command
        super().__init__("")
        own = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--prometheus-port": str(free_port()),
        }
        flags = without(command[3:], *own)
        at = flags.index("--worker-urls") + 1
        named = [flag for flag in flags if flag.startswith("http://")]
        assert flags[at : at + len(named)] == named and len(named) == len(workers), command
        flags[at : at + len(named)] = [server.url for server in workers]
        # The last of two flags of one name counts.
        self.arguments = [*flags, *itertools.chain(*own.items()), *more]
        self.env = {}
