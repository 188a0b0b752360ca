"""Parts of the cache's policy that a benchmark can switch off, one by one. Not for serving.

SGLANG_JENGA_ABLATE=balanced,keep_behind_window
"""

from __future__ import annotations

import os
from typing import NamedTuple

ENV = "SGLANG_JENGA_ABLATE"


class Policy(NamedTuple):
    """What each part does when it is on; all are."""

    affinity: bool = True  # a request's new small pages go to a large page of its own
    balanced: bool = True  # one clock for all groups; else group after group
    aligned: bool = True  # equally old: the longer prefix goes first; else as they come
    anchors: bool = True  # places where requests end or part are refreshed by whoever passes
    shield: bool = True  # and their windows go last while somebody runs on the full pages
    thinning: bool = True  # a state that saves less than its bytes goes first once a longer one is
    keep_behind_window: bool = True  # slid-out pages stay until memory is short; else freed at once


def policy() -> Policy:
    names = [name.strip() for name in os.environ.get(ENV, "").split(",") if name.strip()]
    unknown = set(names) - set(Policy._fields)
    if unknown:
        raise ValueError(f"{ENV}: unknown {', '.join(sorted(unknown))}, known are {Policy._fields}")
    return Policy(**dict.fromkeys(names, False))
