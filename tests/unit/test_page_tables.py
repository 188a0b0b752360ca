"""Memory that the mirror of SGLang's rows takes, beside what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sglang_jenga.layers.full import Full
from sglang_jenga.pages.tables import PageTables
from tests.unit.test_cross import plan

ROWS, TOKENS = 64, 1 << 19
"""2 MiB of page ids a row."""


def resident() -> int:
    """Bytes of this process in memory, that which is shared left out."""
    return 1024 * sum(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


def test_rows_take_memory_for_what_requests_have_reached_alone():
    tables = PageTables(plan(Full()), ROWS, TOKENS)
    before = resident()

    for row in range(ROWS):
        tables.rows[0][row, :100] = row + 1

    assert resident() - before < 8 << 20  # in huge pages it would be 128 MiB
    assert (tables.rows[0][:, :100] == np.arange(1, ROWS + 1)[:, None]).all()
    assert not tables.rows[0][:, 100].any()
