"""Timing on a CUDA device, and the table of what was timed.

Between two runs the L2 cache is overwritten, since in a forward a layer never finds its K and V
there. Alternatives run in turns, round after round, so that a clock that drifts drifts for all.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 1 << 30
"""Many times the L2 of any card, and enough work for the device that the host has launched all of
the timed run before it begins: else the gaps between small kernels would be the host's."""
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel")


def require_cuda() -> None:
    """Leave with one line and status 2 where there is no CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure", file=sys.stderr)
        raise SystemExit(2)


def machine() -> str:
    """Card, driver and versions, in one line."""
    properties = torch.cuda.get_device_properties(0)
    parts = [
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        f"driver {_driver()}",
        f"CUDA {torch.version.cuda}",
    ]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


class Deadline:
    """Time that a benchmark may still take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def passed(self) -> bool:
        return time.monotonic() > self._end


def median_seconds(
    alternatives: Sequence[Callable[[], Any]], *, runs: int = 20, warm: int = 3
) -> list[float]:
    """Median time of each alternative, in seconds, measured in turns on a cold L2."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for run in alternatives:
        for _ in range(warm):
            run()
    events = [[] for _ in alternatives]
    for _ in range(runs):
        for run, pairs in zip(alternatives, events, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
    torch.cuda.synchronize()
    return [
        statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs) for pairs in events
    ]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: the key of its value in a row, its title, how to write it, and how wide
    it is on a terminal."""

    key: str
    title: str
    form: str = "{}"
    width: int = 0

    def cell(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else self.form.format(value)


class Report:
    """Rows, printed one by one under aligned titles and kept in files as JSON and as Markdown.

    The files are written anew with every row: a benchmark that is stopped leaves what it had.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        command: str,
        where: str,
        *,
        json_path: str | None = None,
        markdown_path: str | None = None,
        key: str = "",
    ) -> None:
        """``key``: of which commit and machine the rows are; `earlier` gives those of the same."""
        self.title, self.columns, self.command, self.where = title, columns, command, where
        self.key = key
        self._json_path, self._markdown_path = json_path, markdown_path
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        print(where)

    def earlier(self) -> list[dict[str, Any]]:
        """Rows that a run with the same key has left; none without a key."""
        path = Path(self._json_path) if self._json_path and self.key else None
        if path is None or not path.exists():
            return []
        record = json.loads(path.read_text())
        return record["rows"] if record.get("key") == self.key else []

    def add(self, **row: Any) -> None:
        if not self.rows:
            self._print([column.title for column in self.columns])
        self.rows.append(row)
        self._print([column.cell(row) for column in self.columns])
        self._write()

    def note(self, line: str) -> None:
        """Something that was not measured, or not as asked."""
        self.notes.append(line)
        print(f"note: {line}", flush=True)
        self._write()

    def markdown(self) -> str:
        """The table as benchmarks/results/gpu.md has it, with where and how it was measured."""
        lines = [f"    {self.command}", "", f"{self.where}.", ""]
        lines.append("| " + " | ".join(column.title for column in self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        for row in self.rows:
            lines.append("| " + " | ".join(column.cell(row) for column in self.columns) + " |")
        if self.notes:
            lines += ["", *(f"* {line}" for line in self.notes)]
        return "\n".join(lines) + "\n"

    def _print(self, cells: Sequence[str]) -> None:
        widths = (max(column.width, len(column.title), 8) for column in self.columns)
        print("  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)), flush=True)

    def _write(self) -> None:
        if self._json_path:
            record = {
                "title": self.title,
                "command": self.command,
                "machine": self.where,
                "key": self.key,
                "rows": self.rows,
                "notes": self.notes,
            }
            Path(self._json_path).write_text(json.dumps(record, indent=1) + "\n")
        if self._markdown_path:
            Path(self._markdown_path).write_text(self.markdown())
