"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        ROOT / "kernels" / "README.md",
    ]
)


def anchors(path: Path) -> set[str]:
    """Of all headings, as hosting platforms make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    bare = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in bare}


def dead_links(path: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path):
    assert dead_links(path) == []


def test_a_dead_link_is_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# One Word\n[a](#one-word) [b](#two-words) [c](gone.md) [d](page.md)\n")

    assert dead_links(page) == ["#two-words", "gone.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_target_that_a_command_names_exists(path: Path):
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    modules = re.findall(r"python -m ((?:benchmarks|tests|sglang_jenga)[\w.]*)", text)
    scripts = re.findall(r"(?:bash|python) ((?:benchmarks|tests|\.ci)/[\w./]+)", text)
    places = [*(module.replace(".", "/") + ".py" for module in modules), *scripts]

    assert [place for place in places if not (ROOT / place).exists()] == []
    assert set(re.findall(r"(?:^ *|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_every_result_has_a_date_and_a_command():
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        text = path.read_text()
        assert re.search(r"\* Reported: .*`[0-9a-f]{7}`, 20\d\d-\d\d-\d\d", text), path
        assert re.search(r"^    (python|bash|make) |\* Command: ", text, re.MULTILINE), path


def test_readme_is_two_screens_and_the_index_of_results_one():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len((ROOT / "benchmarks" / "README.md").read_text().splitlines()) <= 70
