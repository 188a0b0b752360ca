"""How a scheduler's refusal reaches the user: one line, status 1, no trace of whoever started it.

A launcher refuses by itself whatever it knows. Some things are known in a scheduler only: how much
memory the weights leave, or that its SGLang is not the launcher's. SGLang's launcher would report
such a scheduler as one that died. So the record carries the name of a file (`expect`), a scheduler
leaves its line there and ends (`leave`), and who waits for the scheduler looks there before it
complains. Several ranks leave the same line, and one is shown.

    launcher                  waits for its schedulers, or for the controller
    data parallel controller  waits for schedulers; ends as quietly as they did
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, NoReturn

import psutil

from sglang_jenga.boot import flags, hook_table, hooks

_expecting = False
_CONTROLLER = "sglang::data_parallel_controller"  # as it names its process


def expect(server_args: Any) -> None:
    """Make a launcher ready to hear of refusals; nothing is written while there is none."""
    global _expecting
    if not _expecting:
        try:
            hooks.apply(hook_table.LAUNCHER)
        except hooks.HookError as error:
            raise flags.Refused(f"--memory-backend jenga cannot start: {error}") from error
        _expecting = True
    place = Path(tempfile.gettempdir()) / f"sglang-jenga-refusal-{uuid.uuid4().hex}"
    server_args._jenga_refusal = str(place)


def leave(reason: object, server_args: Any = None) -> NoReturn:
    """End this scheduler with status 1 and leave `reason` to the launcher."""
    if server_args is None:
        from sglang.srt.runtime_context import get_server_args

        server_args = get_server_args()
    draft = Path(f"{server_args._jenga_refusal}.{os.getpid()}")
    draft.write_text(str(reason))
    draft.rename(server_args._jenga_refusal)  # never seen half written
    parent = psutil.Process(os.getppid())
    if parent.cmdline()[:1] == [_CONTROLLER]:
        parent.terminate()  # it waits for an answer from its schedulers, not for their end
    sys.exit(1)


def _left(server_args: Any) -> str | None:
    """The line that a scheduler has left, if one has."""
    place = getattr(server_args, "_jenga_refusal", None)
    return Path(place).read_text() if place is not None and os.path.exists(place) else None


def wait_for_schedulers(original: Any, scheduler_pipe_readers: Any, scheduler_procs: Any) -> Any:
    from sglang.srt.runtime_context import get_server_args

    try:
        return original(scheduler_pipe_readers, scheduler_procs)
    except RuntimeError:
        server_args = get_server_args()
        reason = _left(server_args)
        if reason is None:
            raise
    for process in scheduler_procs:
        process.kill()
        process.join()  # before the line is taken: a rank may be about to leave it once more
    os.unlink(server_args._jenga_refusal)
    try:
        with flags.one_line(server_args):
            raise flags.Refused(reason)
    except SystemExit as end:
        _end_now(end.code)


def _end_now(text: object) -> NoReturn:
    """End the launcher with status 1 and `text` on stderr, at once: by now it has sockets open, and
    an ordinary exit would wait for what nobody will read from them any more."""
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid(), include_parent=False)  # as SGLang's launchers do
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def launch_group(original: Any, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(self, server_args, *args, **kwargs)
    except EOFError:
        if _left(server_args) is None:
            raise
        sys.exit(1)
