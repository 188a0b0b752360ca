"""The type against a count by hand: which tokens does a token read?"""

import pytest
from sink_window.kind import SINKS, SinkWindow

from sglang_jenga.testing.kind_check import check_kind


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_a_token_reads_the_sinks_and_its_window(width: int):
    def reads(token: int) -> set[int]:
        window = range(max(0, token - width + 1), token)
        return {*range(min(SINKS, token)), *window}

    check_kind(SinkWindow(width), reads)
