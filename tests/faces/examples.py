"""How many examples Hypothesis tries of a test that serves requests."""

from __future__ import annotations

from hypothesis import settings


def examples(share: float) -> settings:
    """So large a share of the profile's examples; a step of them is a whole server's turn. Three at
    least: Hypothesis begins with the emptiest."""
    return settings(max_examples=max(3, round(settings.default.max_examples * share)))
