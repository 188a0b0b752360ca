"""Micro-batches of a pipeline: who runs beside the batch that the scheduler looks at.

With --pp-size SGLang's scheduler keeps several batches, one for each step that is on its way
through the stages, and looks at them in turn. All take pages of one pool, so none is alone with it.
"""

from __future__ import annotations

from typing import Any


def beside(scheduler: Any) -> list[Any]:
    """Requests in other micro-batches than the one at hand; none without a pipeline."""
    running = getattr(scheduler, "running_mbs", ())
    found: dict[int, Any] = {}
    for place, batch in enumerate(running):
        if batch is scheduler.running_batch:
            continue
        for of_place in (batch, scheduler.mbs[place]):  # a prompt in flight is in the latter alone
            for req in of_place.reqs if of_place is not None else ():
                if not req.finished():
                    found[id(req)] = req
    return list(found.values())
