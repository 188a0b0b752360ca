"""Everything that only a GPU can tell, in one command: `make gpu`.

    python -m benchmarks.gpu.suite                     # all parts, under 25 minutes
    python -m benchmarks.gpu.suite --only parity live
    python -m benchmarks.gpu.suite --device cpu        # what a machine without a GPU can do of it

Each part is a process of its own with a limit. What it came to is kept in FOLDER/parts, so a run
that was cut off goes on where it was: parts that passed on this commit and machine are not run
again (`--again` does), nor are the cells of parity that were right. FOLDER/summary.md and
summary.json say what passed, failed, was stopped, or was skipped and why; tables of a part lie
beside them, and log.txt is all output.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
MINUTES = 25.0
UNFINISHED = 75
"""Exit status of a part that was right so far and ran out of time."""
LEAST_SECONDS = 5  # a part with less time than that is not begun
PYTEST = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--tb=short")


class Part(NamedTuple):
    """``arguments`` of Python; ``{out}`` is the folder of results, ``{minutes}`` what the part has,
    ``{device}`` cuda or cpu, ``{key}`` of which commit and machine the results are. ``needs``:
    "gpu", or nothing."""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    needs: str = "gpu"

    def table(self, out: Path) -> Path | None:
        """Where its table lies as JSON."""
        if "--json" not in self.arguments:
            return None
        return Path(self.arguments[self.arguments.index("--json") + 1].format(out=out))

    def notes(self, out: Path) -> list[str]:
        """What its table says that it left out, or found amiss."""
        table = self.table(out)
        return json.loads(table.read_text())["notes"] if table and table.exists() else []


def bench(name: str, file: str, *more: str) -> tuple[str, ...]:
    files = ("--json", f"{{out}}/{file}.json", "--markdown", f"{{out}}/{file}.md")
    return ("-m", f"benchmarks.gpu.{name}", *more, *files)


PARTS = (
    Part(
        "kernels",
        120,
        (*PYTEST, "-m", "gpu", "tests/kernels", "-k", "not flashinfer and not fa3"),
    ),
    Part("warm", 180, ("-m", "benchmarks.gpu.warm")),
    Part("page ops", 75, bench("bench_page_ops", "page_ops", "--minutes", "{minutes}")),
    Part(
        "parity",
        480,
        bench(
            *("bench_parity", "parity"),
            *("--device", "{device}", "--minutes", "{minutes}", "--key", "{key}", "--jobs", "4"),
        ),
        needs="",
    ),
    Part("attention", 200, bench("bench_attention", "attention", "--minutes", "{minutes}")),
    Part(
        "attention tests",
        90,
        (*PYTEST, "-m", "gpu", "tests/kernels", "-k", "flashinfer or fa3 or sglang_stores"),
    ),
    Part("live", 420, bench("bench_live", "live", "--models", "gemma-3-12b")),
)


class Outcome(NamedTuple):
    """``result``: passed, failed, unfinished, stopped or skipped; ``key``: of which commit and
    machine."""

    name: str
    result: str
    seconds: int
    why: str = ""
    key: str = ""

    @property
    def is_bad(self) -> bool:
        return self.result in ("failed", "unfinished", "stopped")


class Suite:
    """A run of some parts with a folder of results."""

    def __init__(self, out: Path, device: str, minutes: float, key: str) -> None:
        self.out, self.device, self.key = out, device, key
        self._end = time.monotonic() + 60 * minutes
        (out / "parts").mkdir(parents=True, exist_ok=True)

    def left(self) -> int:
        return int(self._end - time.monotonic())

    def run(self, parts: Sequence[Part], *, again: bool = False) -> list[Outcome]:
        found: list[Outcome] = []
        notes: list[str] = []
        for part in parts:
            if again:
                self.forget(part)
            outcome = self.kept(part)
            if outcome is None:
                outcome = self.one(part)
                self.keep(outcome)
            print(f"{outcome.name}: {outcome.result} {outcome.why}".rstrip(), flush=True)
            found.append(outcome)
            if outcome.result != "skipped":
                notes += [f"{part.name}: {note}" for note in part.notes(self.out)]
            self.summarise(found, notes)
        return found

    def one(self, part: Part) -> Outcome:
        """Run a part, or say why not; what it has left under our key it need not do again."""
        if part.needs == "gpu" and self.device != "cuda":
            return Outcome(part.name, "skipped", 0, "it needs a GPU")
        limit = min(part.seconds, self.left())
        if limit < LEAST_SECONDS:
            return Outcome(part.name, "skipped", 0, "no time was left")
        # A benchmark ends by itself, with a note of what it left out: its start takes some seconds.
        minutes = (limit - 20 if limit > 40 else limit / 2) / 60
        words = {"out": str(self.out), "minutes": f"{minutes:.2f}"}
        words |= {"device": self.device, "key": self.key}
        arguments = [argument.format(**words) for argument in part.arguments]
        start = time.monotonic()
        status = self.process(arguments, limit)
        seconds = round(time.monotonic() - start)
        if status is None:
            return Outcome(part.name, "stopped", seconds, f"after {limit} s")
        if status == UNFINISHED:
            return Outcome(part.name, "unfinished", seconds, "and goes on when run again")
        if status:
            return Outcome(part.name, "failed", seconds, f"with status {status}")
        return Outcome(part.name, "passed", seconds, key=self.key)

    def process(self, arguments: Sequence[str], limit: float) -> int | None:
        """Its status, None if it had to be stopped, with all that it had started."""
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"== {' '.join(arguments)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    # ---- what is kept -----------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        return self.out / "parts" / f"{name.replace(' ', '-')}.json"

    def keep(self, outcome: Outcome) -> None:
        self._place(outcome.name).write_text(json.dumps(outcome._asdict()) + "\n")

    def forget(self, part: Part) -> None:
        for path in (self._place(part.name), part.table(self.out)):
            if path is not None:
                path.unlink(missing_ok=True)

    def kept(self, part: Part) -> Outcome | None:
        """How the part passed before, on this commit and machine."""
        place = self._place(part.name)
        if not place.exists():
            return None
        outcome = Outcome(**json.loads(place.read_text()))
        return outcome if (outcome.result, outcome.key) == ("passed", self.key) else None

    def summarise(self, found: Sequence[Outcome], notes: Sequence[str]) -> None:
        """Written anew after each part."""
        lines = [f"{self.key}.", "", "| part | result | seconds |", "|---|---|---|"]
        lines += [f"| {o.name} | {f'{o.result} {o.why}'.strip()} | {o.seconds} |" for o in found]
        lines += ["", *(f"* {note}" for note in notes)] if notes else []
        (self.out / "summary.md").write_text("\n".join(lines) + "\n")
        record: dict[str, Any] = {"key": self.key, "parts": [o._asdict() for o in found]}
        record["notes"] = list(notes)
        (self.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    """What is checked out; changes that are not committed make another key."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = "+" if git("status", "--porcelain") else ""
    return (git("rev-parse", "--short", "HEAD") or "no commit") + changed


def environment(device: str) -> str:
    """The machine in one line. Leaves with one line and status 2 if there is no such device."""
    from benchmarks.gpu.timing import machine, require_cuda

    if device == "cpu":
        return "SGLang's CPU engine"
    require_cuda()
    return machine()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start nothing after that")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--again", action="store_true", help="run what has passed before as well")
    options = parser.parse_args(argv)
    key = f"{commit()} on {environment(options.device)}"
    print(key, flush=True)
    suite = Suite(options.out.resolve(), options.device, options.minutes, key)
    parts = [part for part in PARTS if part.name in options.only]
    found = suite.run(parts, again=options.again)
    return 1 if any(outcome.is_bad for outcome in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
