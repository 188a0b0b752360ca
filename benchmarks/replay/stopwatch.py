"""How long a thread works, without what it does on somebody else's behalf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import thread_time

import numpy as np


class Stopwatch:
    """CPU seconds of one thread, in laps; it begins with the end of the first pause.

    Time in which other threads and processes have the core is not in it, but a busy machine has
    slower caches and clocks, so laps are longer there.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.laps: list[float] = []
        self._lapped = 0.0
        self._since: float | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing that happens inside counts. Pauses do not nest."""
        if self._since is not None:
            self.seconds += thread_time() - self._since
        yield
        self._since = thread_time()

    def lap(self) -> None:
        """End a lap, from inside a pause."""
        self.laps.append(self.seconds - self._lapped)
        self._lapped = self.seconds

    def totals(self) -> dict[str, float]:
        """Milliseconds per lap. The mean has what came after the last lap in it too."""
        return {
            "host_ms_per_step": 1e3 * self.seconds / len(self.laps),
            "host_ms_p99": 1e3 * float(np.percentile(self.laps, 99)),
        }
