"""The --memory-backend flag: how it is read, carried and shown.

SGLang builds its ServerArgs struct before plugins load, so the choice cannot be one of its fields.
It rides on the record as bookkeeping (``_memory_backend``), which SGLang pickles to every process
it starts. So does the switch that means something beside it (``_jenga_true_windows``). This module
does not know what they do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_jenga.plan.true_windows import FLAG as TRUE_WINDOWS

ENV = "SGLANG_MEMORY_BACKEND"
CHOICES = ("default", "jenga")


class Refused(ValueError):
    """The user asked for something that is not served; one line per reason."""


def backend_of(server_args: Any) -> str:
    """Return the record's memory backend: the one it carries, else the environment's."""
    return getattr(server_args, "_memory_backend", None) or from_environment()


def is_on(server_args: Any = None) -> bool:
    """Tell whether the record (the published one by default) asks for jenga."""
    if server_args is None:
        from sglang.srt.runtime_context import get_server_args

        server_args = get_server_args()
    return backend_of(server_args) == "jenga"


def wants_true_windows(server_args: Any) -> bool:
    """Tell whether the record asks for --jenga-true-windows, with jenga or without."""
    return bool(getattr(server_args, "_jenga_true_windows", False))


def from_environment() -> str:
    return checked(os.environ.get(ENV) or "default", ENV)


def checked(value: str, source: str) -> str:
    """Return `value` if it is a known backend; name `source` in the refusal if it is not."""
    if value not in CHOICES:
        raise Refused(
            f"{source}: unknown memory backend {value!r}, expected {' or '.join(CHOICES)}"
        )
    return value


@contextmanager
def one_line(server_args: Any) -> Iterator[None]:
    """Turn a refusal into an exit with its lines when the record came from a command line.

    The caller of an `Engine` gets the ValueError itself.
    """
    try:
        yield
    except Refused as refusal:
        if getattr(server_args, "_memory_backend_cli", False):
            stop(refusal)
        raise


def stop(reason: object) -> None:
    """Exit with status 1 and `reason` on stderr, without a stack trace."""
    sys.exit("\n".join(f"sglang-jenga: {line}" for line in str(reason).splitlines()))


def add_flag(_result: None, parser: argparse.ArgumentParser) -> None:
    # No `choices`: argparse would print SGLang's whole usage before the one line that matters.
    parser.add_argument(
        "--memory-backend",
        metavar="{" + ",".join(CHOICES) + "}",
        help="Who manages the KV cache. 'jenga' keeps every kind of layer in one pool of large "
        f"pages (sglang-jenga). Falls back to the environment variable {ENV}.",
    )
    parser.add_argument(
        TRUE_WINDOWS,
        action="store_true",
        help="With --memory-backend jenga: models whose windows SGLang's code reads beyond keep to "
        "them as in Transformers, which changes answers.",
    )


def read_flag(original: Any, cls: type, args: argparse.Namespace) -> Any:
    server_args = original(cls, args)
    server_args._memory_backend_cli = True
    server_args._jenga_true_windows = getattr(args, "jenga_true_windows", False)
    value = getattr(args, "memory_backend", None)
    with one_line(server_args):
        server_args._memory_backend = (
            from_environment() if value is None else checked(value, "--memory-backend")
        )
    return server_args


def show_flag(resolved: dict[str, Any], server_args: Any) -> dict[str, Any]:
    # Only when it is on: without the flag, what SGLang shows stays byte for byte what it was.
    if is_on(server_args):
        resolved["memory_backend"] = backend_of(server_args)
        if wants_true_windows(server_args):
            resolved["jenga_true_windows"] = True
    return resolved


def engine_is_imported() -> bool:
    """`Engine.__init__` loads plugins, so whoever builds an engine has its module by now. The rest,
    the server's own processes, are spared the import."""
    return "sglang.srt.entrypoints.engine" in sys.modules


def record_with_backend(
    build_record: Any,
    *args: Any,
    memory_backend: str | None = None,
    jenga_true_windows: bool = False,
    **kwargs: Any,
) -> Any:
    """Make `sgl.Engine` accept ``memory_backend=`` and ``jenga_true_windows=``, through its
    attribute meant for forks."""
    server_args = build_record(*args, **kwargs)
    server_args._jenga_true_windows = jenga_true_windows
    server_args._memory_backend = (
        from_environment() if memory_backend is None else checked(memory_backend, "Engine")
    )
    return server_args
