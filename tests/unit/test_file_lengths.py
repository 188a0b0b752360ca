"""No file that somebody writes is long."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = 400
WRITTEN_BY_PROGRAMS = (".svg", ".json")
"""Charts, and tables of data: nobody reads them from top to bottom."""
GENERATED = ("docs/upgrading-sglang.md",)
"""By `make docs`, from the table of hooks."""


def tracked() -> list[Path]:
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in found.split("\0") if name]


def too_long(paths: list[Path]) -> dict[str, int]:
    read = [path for path in paths if path.is_file() and path.suffix not in WRITTEN_BY_PROGRAMS]
    lengths = {str(path): path.read_text(encoding="utf-8").count("\n") for path in read}
    return {name: lines for name, lines in lengths.items() if lines > MOST}


def test_no_file_is_longer_than_contributing_says():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git's")
    assert len(tracked()) > 100
    written = [path for path in tracked() if str(path.relative_to(ROOT)) not in GENERATED]
    assert too_long(written) == {}


def test_the_check_counts_lines(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("x = 1\n" * 401)

    assert too_long([path]) == {str(path): 401}
    path.write_text("x = 1\n" * 400)
    assert too_long([path]) == {}
