"""A server of a few kilobytes in this process: what a client can do to it, turn by turn.

    with configured(), hooked(), Rig(Shape(full=3, window_k=2), Settings(page_size=1)) as rig:
        rig.submit([0, 1, 2] * 7, max_new=5)
        rig.run()

After each turn everything is recounted (`tests.faces.recount`), and whoever finishes has to have
the answer that a model without any memory gives.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from sglang_jenga.testing.context import Settings
from tests.faces import recount
from tests.faces.pools import Shape, build_pools
from tests.faces.symbols import answer

QUIET_TURNS = 40
"""Turns in a row in which requests wait and nothing runs, after which nothing ever will: such a
turn leaves everything as it was."""


class Mute(AssertionError):
    """Requests wait, nothing runs, and nothing will."""


class Ended(NamedTuple):
    """How a request ended: ``reason`` is SGLang's ("length", "stop", "abort"). One that is
    ``refused`` SGLang has replaced by a single token before it ran."""

    tokens: list[int]
    reason: str
    message: str
    hit: int
    retractions: int
    refused: bool


class Asked(NamedTuple):
    prompt: list[int]
    max_new: int
    namespace: str | None


class Rig:
    """Only one at a time, inside `configured` and `hooked`: SGLang's configuration is the
    process's."""

    def __init__(
        self,
        shape: Shape,
        settings: Settings | None = None,
        *,
        check: bool = True,
        share: float = 1.0,
        order: str = "fcfs",
    ):
        """Not ``check``: equations are not recounted, which takes half of the time. ``share`` of
        the pool's longest request is the most that random programs ask for. ``order`` of the queue:
        SGLang's ``--schedule-policy``."""
        from tests.faces.scheduler import RigScheduler

        self.shape, self.settings = shape, settings or Settings()
        self.asked: dict[str, Asked] = {}
        self.check = check
        self._inbox: list[Callable[[], Any]] = []
        self._stack = ExitStack()
        try:
            self._stack.enter_context(self.settings.applied())
            self.pools = build_pools(shape, self.settings)
            self.scheduler = RigScheduler(shape, self.settings, self.pools, order)
        except BaseException:
            self._stack.close()
            raise
        self.most_tokens = int(share * self.pools.longest)
        self._told: set[str] = set()
        self.fails: set[str] = set()
        """Requests that clients have aborted, or that a test has SGLang abort."""

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    # ---- what clients do; SGLang hears of it at the beginning of the next turn ------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_new: int = 8,
        *,
        namespace: str | None = None,
        known_length: bool = True,
        stop: Sequence[int] = (),
        cached: bool = True,
        beam_width: int | None = None,
        encoder: int = 0,
    ) -> str:
        """Send a request and return its id. ``known_length``: SGLang's ``ignore_eos``, with which
        admission counts on all of ``max_new``; ``stop``: tokens that end it early; not ``cached``:
        it leaves nothing in the trees; ``beam_width``: as a client may ask for; ``encoder``: so
        many tokens at its beginning are a picture's."""
        rid = f"r{len(self.asked)}"
        self.asked[rid] = Asked(list(prompt), max_new, namespace)
        self._inbox.append(
            partial(
                self.scheduler.handle_generate_request,
                _message(
                    rid, prompt, max_new, namespace, known_length, stop, cached, beam_width, encoder
                ),
            )
        )
        return rid

    def abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.fails.add(rid)
        self._inbox.append(partial(self.scheduler.abort_request, AbortReq(rid=rid)))

    def pause(self, mode: str = "retract") -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self._inbox.append(
            partial(self.scheduler.pause_generation, PauseGenerationReqInput(mode=mode))
        )

    def resume(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        self._inbox.append(
            partial(
                self.scheduler.continue_generation,
                ContinueGenerationReqInput(torch_empty_cache=False),
            )
        )

    def flush(self) -> None:
        """SGLang does so only while nothing runs."""
        self._inbox.append(partial(self.scheduler.flush_cache, empty_cache=False))

    def exchange_weights(self) -> None:
        """New weights have been loaded, and the client wants the cache to be kept."""
        self._inbox.append(self.scheduler.weights_were_exchanged)

    def retract(self) -> None:
        """The next decode step retracts a request, as SGLang's own test switch has it do."""
        self._inbox.append(self.scheduler.retract_next_step)

    def slide(self, *, exactly: bool = False) -> None:
        """What windows have left behind is given up, as when memory is short."""
        self.pools.cache.windows.slide(self.pools.allocator.pressure.decoding, exactly=exactly)

    # ---- time passes ----------------------------------------------------------------------------

    def turn(self, count: int = 1) -> None:
        """So many passes of SGLang's event loop."""
        for _ in range(count):
            inbox, self._inbox = self._inbox, []
            self.scheduler.turn(*inbox)
            self._check()

    def run(self, most: int = 100_000) -> None:
        """Turns until nothing runs and nothing waits.

        Raises Mute if what waits will wait for ever.
        """
        quiet = 0
        for _ in range(most):
            if not self._inbox and self.scheduler.is_fully_idle():
                return
            before = self.scheduler.model.forwards, len(self.scheduler.output_streamer.ended)
            self.turn()
            after = self.scheduler.model.forwards, len(self.scheduler.output_streamer.ended)
            quiet = quiet + 1 if before == after else 0
            if quiet >= QUIET_TURNS:
                waiting = [req.rid for req in self.scheduler.waiting_queue]
                raise Mute(f"{waiting or self.scheduler.chunked_req.rid} will never be run")
        raise Mute(f"no end after {most} turns")

    @property
    def paused(self) -> bool:
        return self.scheduler._engine_paused

    # ---- what came of it ------------------------------------------------------------------------

    def ended(self, rid: str) -> Ended | None:
        req = self.scheduler.output_streamer.ended.get(rid)
        if req is None:
            return None
        reason = req.finished_reason or req.to_finish
        why = reason.to_json() if reason else self.scheduler.output_streamer.aborted.get(rid, {})
        return Ended(
            list(req.output_ids),
            why.get("type", "abort"),
            str(why.get("message", "")),
            req.cached_tokens,
            req.retraction_count,
            list(req.origin_input_ids) != self.asked[rid].prompt,
        )

    def ask(self, prompt: Sequence[int], max_new: int = 8, **options: Any) -> Ended:
        """Send one request and wait for its end."""
        rid = self.submit(prompt, max_new, **options)
        self.run()
        ended = self.ended(rid)
        assert ended is not None
        return ended

    def _find(self, rid: str) -> Any:
        scheduler = self.scheduler
        known = [*scheduler.waiting_queue, *scheduler.output_streamer.ended.values()]
        for batch in (scheduler.running_batch, scheduler.last_batch):
            known += batch.reqs if batch is not None else []
        return next((req for req in known if req.rid == rid), None)

    def _check(self) -> None:
        for rid in self.scheduler.output_streamer.ended.keys() - self._told:
            self._told.add(rid)
            self._check_answer(rid)
        if self.check:
            recount.everything(self.pools, self.scheduler)

    def _check_answer(self, rid: str) -> None:
        ended, asked = self.ended(rid), self.asked[rid]
        if ended.refused:
            return
        aborted = ended.reason == "abort" and rid not in self.fails
        assert not aborted, f"SGLang aborted {rid}: {ended.message}"
        known = answer(asked.prompt, len(ended.tokens), _namespace(asked.namespace))
        assert ended.tokens == known, f"{rid} was answered with wrong tokens"
        if ended.reason == "length":
            assert len(ended.tokens) <= asked.max_new

    def check_nothing_lost(self) -> None:
        """A flush of an idle server leaves an empty pool."""
        self.flush()
        self.turn()
        recount.nothing_is_lost(self.pools)


def _namespace(extra_key: str | None) -> Hashable:
    return (extra_key, None)


def _message(
    rid: str,
    prompt: Sequence[int],
    max_new: int,
    namespace: str | None,
    known_length: bool,
    stop: Sequence[int],
    cached: bool,
    beam_width: int | None,
    encoder: int,
) -> Any:
    """What SGLang's tokenizer would send."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    from sglang_jenga.testing.messages import message

    return message(
        rid,
        array("q", prompt),
        {
            "max_new_tokens": max_new,
            "ignore_eos": known_length,
            "stop_token_ids": list(stop) or None,
            "beam_width": beam_width,
        },
        mm_inputs=encoder or None,
        extra_key=namespace,
        # SGLang's warm-up requests name this host; their KV is not cached.
        bootstrap_host=None if cached else FAKE_BOOTSTRAP_HOST,
    )
