"""Whether plots can be drawn, asked before a benchmark runs for hours."""

from __future__ import annotations

import importlib.util


def missing() -> str | None:
    """One line on what to install, or None."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "plots need matplotlib, which the extra `bench` brings: pip install '.[bench]'"
