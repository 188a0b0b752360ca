"""Boot SGLang's engine for one play, wait for what its scheduler process found, stop it.

The engine's processes are those of a server, forked from one that has imported SGLang already
(see `sglang_jenga.testing.engines`). The tokenizer and detokenizer idle: requests enter and leave
in the scheduler.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.replay.geometries import Geometry
from sglang_jenga.testing.engines import (
    CPU_ARGUMENTS,
    forking_engine,
    lead_processes,
    preload,
    tail,
)


class ReplayFailed(RuntimeError):
    """The replay did not come to its end; the message ends with the server's last lines."""


class TookTooLong(ReplayFailed):
    """It might come to its end on a quicker machine."""


def play_on_engine(
    geometry: Geometry, play: Any, arguments: dict[str, Any], env: dict[str, str], seconds: float
) -> Any:
    """Play `play` on an engine of these arguments; returns the driver's `Outcome`.

    Raises ReplayFailed if the engine does not boot, dies, gets stuck or takes over `seconds`.
    """
    with PlayingEngine(geometry, play, arguments, env) as engine:
        deadline = time.monotonic() + seconds
        while not engine.ended():
            if time.monotonic() > deadline:
                raise TookTooLong(f"{geometry.name}: no end in {seconds:.0f} s\n{engine.log()}")
            time.sleep(0.05)
        return engine.outcome()


class PlayingEngine:
    """An engine at play, from its start to its stop, which a ``with`` sees to."""

    def __init__(
        self, geometry: Geometry, play: Any, arguments: dict[str, Any], env: dict[str, str]
    ) -> None:
        preload()
        self._name = geometry.name
        self._folder = tempfile.TemporaryDirectory(prefix="replay-")
        folder = Path(self._folder.name)
        model = geometry.write_model(folder / "model")
        self._log, self._outcome = folder / "log", folder / "outcome"
        self._process = multiprocessing.get_context("fork").Process(
            target=_engine_process,
            args=(self._log, self._outcome, play, env, _arguments(model, arguments)),
        )
        self._process.start()

    def __enter__(self) -> PlayingEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        # The child leads a process group that holds its scheduler and detokenizer.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def ended(self) -> bool:
        """Whether there is an outcome, or will be none."""
        return self._outcome.exists() or not self._process.is_alive()

    def outcome(self) -> Any:
        """What the driver found. Raises ReplayFailed if the engine died or the driver got stuck."""
        result = "the engine died"
        if self._outcome.exists():
            result = pickle.loads(self._outcome.read_bytes())
        if isinstance(result, str):
            raise ReplayFailed(f"{self._name}: {result}\n{self.log()}")
        return result

    def log(self) -> str:
        """The server's last lines."""
        return tail(self._log)


def _arguments(model: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: CPU_ARGUMENTS[name] for name in CPU_ARGUMENTS if name != "max_total_tokens"}
    return {
        **defaults,
        "model_path": str(model),
        "dtype": "bfloat16",
        "load_format": "dummy",
        "sleep_on_idle": False,
        "log_level": "warning",
        "decode_log_interval": 1 << 30,
        **arguments,
    }


def _engine_process(
    log_path: Path, outcome: Path, play: Any, env: dict[str, str], arguments: dict[str, Any]
) -> None:
    lead_processes(log_path, env)
    engine = forking_engine()
    from benchmarks.replay.seams import replay_scheduler_process

    class ReplayEngine(engine.Engine):
        run_scheduler_process_func = staticmethod(
            functools.partial(replay_scheduler_process, play, outcome)
        )

    ReplayEngine(**arguments)
    threading.Event().wait()  # until the parent has what it wants and stops this group
