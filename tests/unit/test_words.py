"""docs/words.md against the code: every word is in use, no retired word is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A word that is gone, and what is said instead. A rename adds its row here.
RETIRED = {
    "cpu_ops": "cpu/sgl_kernel",
    "cpu_repairs": "cpu/repairs",
    "planner_report": "plan/report",
    "state_ops": "cpu/state_operators",
    "token_allocator": "serving/allocator",
    "torch_native_window": "cpu/window_attention",
    "page_tables": "pages/tables",
    "anchored": "resume_point",
    "worth_of_prefix_page": "state_cost_tokens",
    "give_up_states": "release_tracking",
    "num_idle": "num_reclaimable",
    "modelgeometry": "ConfigLayers",
    "smalls_for_request": "LayerGroup.held",
    "state_group": "ServedGroups.state",
    "install_engine_argument": "a row of the table of hooks",
}


def words() -> list[str]:
    """The first column of every table, a row's words one by one."""
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "words.md").read_text(), re.MULTILINE)
    return [word for row in rows if row != "word" for word in row.split(", ")]


def code() -> dict[str, str]:
    folders = ("sglang_jenga", "radix", "kernels")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def is_used(word: str, text: str) -> bool:
    """As it stands, in a name, or with an ending: `slot map` is in ``slot_map``."""
    pattern = r"[\s_]+".join(map(re.escape, word.split()))
    return re.search(rf"(?<![a-z]){pattern}", text, re.IGNORECASE) is not None


def test_the_page_has_words():
    assert {"large page", "cached", "fork", "branch"} <= set(words())
    assert len(words()) == len(set(words())) > 50


@pytest.mark.parametrize("word", words())
def test_word_is_used_in_the_code(word: str):
    outside = "\n".join(text for path, text in code().items() if "testing" not in path)

    assert is_used(word, outside)


@pytest.mark.parametrize("word", RETIRED)
def test_retired_word_is_gone(word: str):
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    # Names of SGLang's stand in some, and the table of this module.
    exempt = ("test_words.py", "test_parents.py")
    documents += [path for path in (ROOT / "tests").rglob("*.py") if path.name not in exempt]
    texts = code() | {str(path): path.read_text() for path in documents}

    assert [place for place, text in texts.items() if is_used(word, text)] == []


def test_the_check_sees_words_and_only_words():
    assert is_used("slot map", "self.slot_map")
    assert not is_used("slot map", "slots, mapped")
    assert not is_used("thin", "something")
