"""Parts of the cache's policy that a benchmark can switch off, one by one. Not for serving.

SGLANG_JENGA_ABLATE=balanced,keep_behind_window
"""

from __future__ import annotations

import os
from typing import NamedTuple

ENV = "SGLANG_JENGA_ABLATE"


class CacheOptions(NamedTuple):
    """What each part does when it is on; all are."""

    affinity: bool = True  # a request's new small pages go to a large page of its own
    balanced: bool = True  # one clock for all groups; else group after group
    aligned: bool = True  # equally old: the longer prefix goes first; else as they come
    resume_points: bool = True  # places where requests end or part are refreshed by whoever passes
    shield: bool = True  # and their windows go last while somebody runs on the full pages
    cheap_states: bool = True  # a state that saves less than its bytes goes before a longer one
    worth_tracking: bool = True  # short prompts leave no state; else every prompt does
    keep_behind_window: bool = True  # slid-out pages stay until memory is short; else freed at once


ALL_ON = CacheOptions()


def from_environment() -> CacheOptions:
    """The parts that a benchmark has left on.

    Raises:
        ValueError: the variable names a part that does not exist.
    """
    names = [name.strip() for name in os.environ.get(ENV, "").split(",") if name.strip()]
    unknown = set(names) - set(CacheOptions._fields)
    if unknown:
        known = ", ".join(CacheOptions._fields)
        raise ValueError(f"{ENV}: unknown {', '.join(sorted(unknown))}, known are {known}")
    return CacheOptions(**dict.fromkeys(names, False))
