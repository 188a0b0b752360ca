"""What the fast tests cover of the folders that run inside SGLang, file by file.

    make coverage                               # all fast tests
    make coverage ARGS="tests/faces tests/boot"

Processes that tests start count as well. Ends with status 1 if of any file fewer statements than
the bar are run. More arguments are pytest's; of a part of the tests the figures are a lower bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sglang_jenga/boot", "sglang_jenga/serving")
BAR = 85.0
NOT_SERVING = {"write_catalogue"}  # `make docs` runs it; a slow test holds what it writes


def measure(folder: Path, arguments: list[str]) -> tuple[int, dict]:
    """Run pytest; return its exit status and coverage's report of every file."""
    report = folder / "report.json"
    # Forked and spawned processes find the settings and write beside each other by these.
    env = {
        "COVERAGE_FILE": str(folder / "data"),
        "COVERAGE_RCFILE": str(ROOT / "pyproject.toml"),
        "HYPOTHESIS_PROFILE": os.environ.get("HYPOTHESIS_PROFILE", "fast"),
    }

    def coverage(*command: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "coverage", *command], cwd=ROOT, env=os.environ | env
        ).returncode

    tests = coverage("run", "-m", "pytest", "-m", "not slow", *arguments)
    coverage("combine", "--quiet")
    coverage("json", "--quiet", "-o", str(report))
    return tests, json.loads(report.read_text())["files"]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        tests, found = measure(Path(folder), sys.argv[1:])
    below = []
    print(f"{'file':44} statements  missed  covered")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.stem in {"__init__", *NOT_SERVING}:
                continue
            summary = found[name]["summary"]
            total, missed = summary["num_statements"], summary["missing_lines"]
            percent = 100 * (1 - missed / total)
            print(f"{name:44} {total:10} {missed:7} {percent:7.1f}%")
            if percent < BAR:
                below.append(name)
                print(f"    not run: {found[name]['missing_lines']}")
    if below:
        print(f"below {BAR:.0f} %: {', '.join(below)}")
    return 1 if below or tests else 0


if __name__ == "__main__":
    sys.exit(main())
