"""Layer types of a package of its own, known by their names as where it is installed."""

from __future__ import annotations

import sys

from sglang_jenga.layers.registry import register_kind
from sglang_jenga.testing.cpu_engine import ROOT

sys.path.append(str(ROOT / "examples" / "sink_window"))

from sink_window.kind import SINKS, SinkWindow, SinkWindowPolicy

register_kind(SinkWindow)

__all__ = ["SINKS", "SinkWindow", "SinkWindowPolicy"]
