"""Which SGLang is let in, and what is said of one that was not tested."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import sglang.version

from sglang_jenga import plugin

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def found(monkeypatch):
    return lambda version: monkeypatch.setattr(sglang.version, "__version__", version)


@pytest.mark.parametrize(
    "version", ["0.5.23", "0.5.23.post1", "0.5.23+g1a2b3c4", "0.5.23.post1.dev4+g1a2b3c4"]
)
def test_post_releases_and_builds_of_the_source_are_let_in(found, version: str):
    found(version)

    assert plugin._version_problem() is None


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23rc1", "0.5.24", "0.5.24.dev3", "0.0.0.dev0"])
def test_another_version_is_refused_with_range_and_what_was_found(found, version: str):
    found(version)

    assert plugin._version_problem() == (
        f"sglang-jenga 0.1.0 works with SGLang >=0.5.23,<0.5.24 only, and this is SGLang {version}"
    )


def test_a_version_that_was_not_tested_is_named_in_a_warning(found, caplog):
    found("0.5.23.post1")

    plugin._warn_of_unchecked_version()

    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "tested with SGLang 0.5.23, and this is SGLang 0.5.23.post1" in caplog.text


def test_the_tested_version_needs_no_warning(found, caplog):
    found(plugin.CHECKED_SGLANG)

    plugin._warn_of_unchecked_version()

    assert caplog.records == []


def test_plugin_package_and_setup_name_the_same_versions():
    setup = (ROOT / ".ci" / "setup.sh").read_text()
    package = (ROOT / "pyproject.toml").read_text()

    assert f"SGLANG={plugin.CHECKED_SGLANG} " in setup
    assert re.findall(r"^RANGE='(.*?)'", setup, re.MULTILINE) == [plugin.SGLANG_RANGE]
    assert f'"sglang{plugin.SGLANG_RANGE}"' in package
