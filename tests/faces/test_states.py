"""States of requests, tracked and cached, beside windows that slide."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.rig import Rig


@pytest.mark.parametrize("strategy", ["extra_buffer", "extra_buffer_lazy"])
def test_a_prompt_is_cached_though_its_next_tracking_slot_makes_windows_slide(strategy: str):
    shape = MODELS["three-way"][1]._replace(num_large=18)
    with Rig(shape, Settings(strategy=strategy, chunk=None)) as rig:
        rig.submit([0] * 26, 1)
        rig.submit([1] * 38, 8)
        rig.run()
