"""Boot SGLang's engine for one replay, wait for what its scheduler process found, stop it.

The engine's processes are those of a server, forked from one that has imported SGLang already (see
`tests.engines`). The tokenizer and detokenizer idle: requests enter and leave in the scheduler.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.replay.geometries import Geometry
from tests.engines import CPU_ARGUMENTS, _die_with_parent, _tail, preload


class ReplayFailed(RuntimeError):
    """The replay did not come to its end; the message ends with the server's last lines."""


def play_on_engine(
    geometry: Geometry, play: Any, arguments: dict[str, Any], env: dict[str, str], seconds: float
) -> Any:
    """Play `play` on an engine of these arguments; returns the driver's `Outcome`.

    Raises ReplayFailed if the engine does not boot, dies, gets stuck or takes over `seconds`.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        model = geometry.write_model(Path(folder) / "model")
        log, outcome = Path(folder) / "log", Path(folder) / "outcome"
        process = multiprocessing.get_context("fork").Process(
            target=_engine_process,
            args=(log, outcome, play, env, _arguments(model, arguments)),
        )
        process.start()
        try:
            result = _await(outcome, process, seconds)
        finally:
            # The child leads a process group that holds its scheduler and detokenizer.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
        if isinstance(result, str):
            raise ReplayFailed(f"{geometry.name}: {result}\n{_tail(log)}")
        return result


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


def _await(outcome: Path, process: Any, seconds: float) -> Any:
    """The outcome, or why there is none."""
    deadline = time.monotonic() + seconds
    while not outcome.exists():
        if not process.is_alive():
            # It may have written its last words just before.
            return pickle.loads(outcome.read_bytes()) if outcome.exists() else "the engine died"
        if time.monotonic() > deadline:
            return f"no end in {seconds:.0f} s"
        time.sleep(0.05)
    return pickle.loads(outcome.read_bytes())


def _engine_process(
    log_path: Path, outcome: Path, play: Any, env: dict[str, str], arguments: dict[str, Any]
) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    with log_path.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(env)
    import torch
    from sglang.srt.entrypoints import engine

    from benchmarks.replay.seams import replay_scheduler_process

    torch.set_num_threads(1)  # torch may be older here than OMP_NUM_THREADS
    engine.mp.set_start_method("fork", force=True)
    engine.mp.set_start_method = lambda *args, **kwargs: None

    class ReplayEngine(engine.Engine):
        run_scheduler_process_func = staticmethod(
            functools.partial(replay_scheduler_process, play, outcome)
        )

    ReplayEngine(**arguments)
    threading.Event().wait()  # until the parent has what it wants and stops this group
