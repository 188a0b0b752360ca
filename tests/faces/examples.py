"""How many examples Hypothesis tries of something that takes a tenth of a second."""

from __future__ import annotations

import os

from hypothesis import Phase, settings

_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""Not ``explain``: it traces every line of SGLang, in gigabytes."""


def examples(share: float, *, fails: bool = False) -> settings:
    """So large a share of the profile's examples. ``fails``: it is known to, so that continuous
    integration looks no further for a smaller counterexample."""
    profile = settings.default
    nightly = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
    phases = _PHASES if nightly or not fails else _PHASES[:-1]
    return settings(
        max_examples=max(1, int(profile.max_examples * share)),
        phases=phases,
        report_multiple_bugs=False,
    )
