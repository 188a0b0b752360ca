"""What SGLang calls in every process, and the two moments at which the flag takes hold.

SGLang logs and swallows what a plugin raises, and then serves with its own pools. So nothing here
stops by raising in `load()`: the error is kept, and the first process that carries the flag stops.

    load()            every process      the flag itself, and the two hooks below
    resolve_once()    launcher, Engine   register the models that SGLang lacks
                                         refuse, declare, patch SGLang      (flag only)
    publish()         scheduler, controller of schedulers
                                         the same models
                                         patch SGLang before anything is built (flag only)

A process in which not even `load()` ran stops as well: `resolve_once` declares the radix cache
"jenga", a name that only our own registration makes known.
"""

from __future__ import annotations

import logging
from typing import Any

from packaging.specifiers import SpecifierSet

from sglang_jenga import __version__
from sglang_jenga.boot import (
    flags,
    hook_table,
    hooks,
    own_models,
    rebinding,
    refusal,
    true_windows,
    validate,
    window_models,
)
from sglang_jenga.cpu import ranks, sgl_kernel
from sglang_jenga.layers import registry

CHECKED_SGLANG = "0.5.23"
SGLANG_RANGE = ">=0.5.23,<0.5.24"
"""As in pyproject.toml: post-releases and builds of the same source are let in."""
LOAD_ERROR: str | None = None

_logger = logging.getLogger(__name__)
_active = False


def load() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    global LOAD_ERROR
    LOAD_ERROR = _version_problem()
    try:
        hooks.register(hook_table.FLAG)
        rebinding.rebind(hook_table.ENGINE)
    except hooks.HookError as error:
        LOAD_ERROR = LOAD_ERROR or str(error)
        if flags.from_environment() == "jenga":
            # Nothing of ours will be asked again; the flag on a command line is now unknown.
            flags.stop(LOAD_ERROR)
    try:
        if LOAD_ERROR is None:
            _load_extras()
    except Exception as error:  # whatever it is, SGLang would only log it
        LOAD_ERROR = f"{type(error).__name__}: {error}"
    if LOAD_ERROR is not None:
        _logger.warning("--memory-backend jenga is not available: %s", LOAD_ERROR)


def _version_problem() -> str | None:
    from sglang.version import __version__ as found

    if SpecifierSet(SGLANG_RANGE).contains(found, prereleases=True):
        return None
    return (
        f"sglang-jenga {__version__} works with SGLang {SGLANG_RANGE} only, "
        f"and this is SGLang {found}"
    )


def _warn_of_unchecked_version() -> None:
    from sglang.version import __version__ as found

    if found != CHECKED_SGLANG:
        _logger.warning(
            "sglang-jenga %s was tested with SGLang %s, and this is SGLang %s: every function that "
            "it hooks has the parameters it was written for, what they do was not compared",
            __version__,
            CHECKED_SGLANG,
            found,
        )


def _load_extras() -> None:
    sgl_kernel.complete()
    if sgl_kernel.cpu_engine_requested():
        rebinding.rebind(hook_table.CPU_RESOLUTION)


def activate() -> None:
    """Patch SGLang for jenga, once per process; raise if anything is not as we know it."""
    global _active
    if LOAD_ERROR is not None:
        raise flags.Refused(f"--memory-backend jenga cannot start: {LOAD_ERROR}")
    if _active:
        return
    try:
        from sglang_jenga.boot import construction

        registry.load_installed()  # others' code: of no server without the flag
        hooks.check(hook_table.CALLS)
        hooks.apply(hook_table.SCHEDULER)
    except (ImportError, hooks.HookError, registry.RegistrationError) as error:
        raise flags.Refused(f"--memory-backend jenga cannot start: {error}") from error
    validate.register_resolution_steps()
    window_models.register_overrides()
    construction.register_cache_backend()
    _active = True


def resolve_once(original: Any, server_args: Any) -> None:
    if getattr(server_args, "_resolution_finished", False):
        return original(server_args)
    with flags.one_line(server_args):
        # From here on no process asks its own environment: the record carries the answer.
        server_args._memory_backend = flags.backend_of(server_args)
        on, truly = flags.is_on(server_args), flags.wants_true_windows(server_args)
        window_models.enable(on, true_windows=truly)
        if LOAD_ERROR is None:
            own_models.register_config()
        if not on:
            if truly:
                _logger.warning(
                    "%s does nothing without --memory-backend jenga", flags.TRUE_WINDOWS
                )
            return original(server_args)
        activate()
        _warn_of_unchecked_version()
        validate.before_resolution(server_args)
        original(server_args)
        validate.after_resolution(server_args)
        from sglang_jenga.boot import boot_check

        boot_check.require_known_parts()
        boot_check.require_room(server_args)
        refusal.expect(server_args)


def before_publish(server_args: Any, *, role: str, **_: Any) -> None:
    if role == "scheduler" and sgl_kernel.cpu_engine_requested():
        # With the flag or without: stock SGLang needs them as well.
        rebinding.rebind(hook_table.CPU_SCHEDULER)
        ranks.prepare(server_args)
    if role == "scheduler" and LOAD_ERROR is None:
        own_models.register_config()
        own_models.await_lookup()
    if not flags.is_on(server_args):
        return
    # Only a scheduler builds pools; patching the others would cost them the imports.
    if role == "dp_controller":
        hooks.apply(hook_table.CONTROLLER)
    elif role == "scheduler":
        truly = flags.wants_true_windows(server_args)
        window_models.enable(True, true_windows=truly)
        try:
            activate()
            if truly:
                true_windows.activate()
        except flags.Refused as refused:
            refusal.leave(refused, server_args)
