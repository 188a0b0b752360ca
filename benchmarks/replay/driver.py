"""The part of a replay that lives in the scheduler process: clients, clock and null model in one.

SGLang asks for new requests, forwards batches and hands over outputs as always; these three seams
lead here. A request arrives once the clock has passed its moment, each forward moves the clock by
what the roofline says, and when nothing runs and nothing waits the clock jumps to the next
arrival. So a replay's course depends on the workload and the pool alone. One simplification: with
overlap, SGLang schedules a step while the previous one still runs; here it already knows what
arrives in that time.

What is done here is no part of the scheduler's work: the seams pause the stopwatch meanwhile.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.utils import GenerationBatchResult

from benchmarks.replay.clock import Images
from benchmarks.replay.messages import tokenized
from benchmarks.replay.null_model import NullModel
from benchmarks.replay.play import Outcome, Play
from benchmarks.replay.recorder import Recorder
from benchmarks.replay.requests import Request
from benchmarks.replay.result import Served
from benchmarks.replay.stopwatch import Stopwatch
from sglang_jenga.boot.hooks import Hook

IDLE_PASSES = 200
"""Passes of the scheduler without a batch, while requests wait, before a replay is called stuck."""


class Stuck(RuntimeError):
    """The replay cannot go on; the message says what waits for what."""


class Driver:
    hooks: tuple[Hook, ...] = ()
    """What it wants patched besides the seams."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.now = 0.0
        self.model = NullModel(play.requests)
        self.recorder = Recorder(play.groups, play.pool_bytes)
        self.watch = Stopwatch()
        self._spans: list[float] = []  # modelled seconds of each step, one to each of its laps
        self.outcome: Outcome | None = None
        self._due: list[tuple[float, int, Request]] = []
        self._followers: dict[str, list[tuple[int, Request]]] = defaultdict(list)
        for order, request in enumerate(play.requests):
            if request.after is None:
                heapq.heappush(self._due, (request.at, order, request))
            else:
                self._followers[request.after].append((order, request))
        self._served: dict[str, Served] = {}
        self._scheduler: Any = None
        self._idle = 0

    # ---- requests come ------------------------------------------------------------------------

    def arrivals(self, scheduler: Any) -> list[TokenizedGenerateReqInput]:
        """Requests whose moment has come, as the tokenizer would send them."""
        if self._scheduler is None:
            self._scheduler = scheduler
            self.recorder.attach(scheduler)
        arrived = []
        while self._due and self._due[0][0] <= self.now:
            at, _, request = heapq.heappop(self._due)
            self.model.planted[request.rid].arrived = at
            arrived.append(tokenized(request, known_length=self.play.known_lengths))
        return arrived

    def idle(self) -> None:
        """Nothing could be run. Jump to the next arrival; if there is none, that was all.

        Raises Stuck if requests wait that SGLang will never admit, or that nobody ends.
        """
        if self._due:
            if self._scheduler.is_fully_idle():
                self.now = max(self.now, self._due[0][0])
                self._idle = 0
            else:
                self._count_idle()
        elif len(self._served) == len(self.play.requests):
            self.outcome = self._result()
        else:
            self._count_idle()

    def _count_idle(self) -> None:
        self._idle += 1
        if self._idle < IDLE_PASSES:
            return
        waiting = self._scheduler.waiting_queue
        first = f", the first of {len(waiting[0].full_untruncated_fill_ids)}" if waiting else ""
        raise Stuck(
            f"no step in {IDLE_PASSES} passes: {len(self._served)} of {len(self.play.requests)} "
            f"requests served, {len(waiting)} waiting{first}; pool: {self.recorder.pool_described}"
        )

    # ---- batches run --------------------------------------------------------------------------

    def forward(self, batch: Any) -> GenerationBatchResult:
        """Answer a batch, and let so much time pass as its model would take."""
        self.watch.lap()
        ends = batch.seq_lens_cpu.numpy().astype(np.int64)
        if batch.forward_mode.is_decode():
            starts = ends - 1
        else:
            starts = np.array(batch.prefix_lens, dtype=np.int64)
        counts = ends - starts
        images = self._images(batch)
        play = self.play
        span = play.clock.step_seconds(
            play.weights,
            play.real_groups,
            starts,
            counts,
            images,
            overlap=self._scheduler.enable_overlap,
        )
        if images is not None:
            # SGLang counts a step's text; rows, prompts and hits have the images at the beginning.
            starts, counts = starts + images.lengths - images.new, counts + images.new
        self.now += span
        self._spans.append(span)
        self._idle = 0
        self.recorder.step(self._scheduler, batch, starts, counts, span, self.now)
        rids = [req.rid for req in batch.reqs]
        tokens, ended = self.model.answer(rids, starts, counts, self.now)
        for rid in ended:
            for order, request in self._followers.pop(rid, ()):
                heapq.heappush(self._due, (self.now + request.at, order, request))
        return GenerationBatchResult(next_token_ids=torch.from_numpy(tokens))

    def _images(self, batch: Any) -> Images | None:
        """What SGLang has told the model of a step's images; None without an encoder.

        Raises Stuck if a request has not the image that it came with.
        """
        if batch.encoder_lens_cpu is None:
            return None
        lengths = np.array(batch.encoder_lens_cpu, dtype=np.int64)
        for req, length in zip(batch.reqs, batch.encoder_lens_cpu, strict=True):
            sent = self.model.planted[req.rid].encoder
            if length != sent:
                raise Stuck(f"{req.rid} came with an image of {sent} tokens and has {length}")
        if batch.forward_mode.is_decode():
            return Images(lengths, np.zeros_like(lengths))
        hits = np.array([req.prefix_len for req in batch.reqs], dtype=np.int64)
        return Images(lengths, np.maximum(0, lengths - hits))

    # ---- outputs leave ------------------------------------------------------------------------

    def output(self, reqs: list[Any]) -> None:
        """See to it that what ends has ended well, and with the planted answer."""
        for req in reqs:
            if not req.finished() or req.finished_output:
                continue
            req.finished_output = True
            reason = req.finished_reason.to_json()
            planted = self.model.planted[req.rid]
            if reason["type"] != "length":
                raise Stuck(f"{req.rid} ({planted.prompt_tokens} tokens) was refused: {reason}")
            if list(req.output_ids) != planted.answer:
                raise Stuck(f"{req.rid} was not answered with its planted tokens")
            self._served[req.rid] = planted.served(req.rid, req.retraction_count)

    def aborted(self, req: Any) -> None:
        raise Stuck(f"{req.rid} was aborted by SGLang: {req.to_finish}")

    def _result(self) -> Outcome:
        served = [self._served[request.rid] for request in self.play.requests]
        totals = self.recorder.totals() | self.watch.totals() | request_totals(served)
        waits = waits_for_host(self._spans, self.watch.laps, self._scheduler.enable_overlap)
        seconds = totals["modelled_seconds"] + waits
        totals["host_paced_tokens_per_s"] = totals["output_tokens"] / seconds
        return Outcome(self.recorder.thinned(), served, totals, self.recorder.pool_described)


def waits_for_host(spans: Sequence[float], laps: Sequence[float], overlap: bool) -> float:
    """Seconds that a GPU would wait for the scheduler's thread: a step is scheduled while the one
    before runs, or with no ``overlap`` after it. ``spans[i]`` are the seconds of step i on the GPU,
    ``laps[i]`` those that scheduling it took; waits that an idle server would have had anyway are
    in it too."""
    if not overlap:
        return float(np.sum(laps))
    ahead = np.asarray(laps)[1:] - np.asarray(spans)[:-1]
    return float(laps[0] + np.maximum(0, ahead).sum())


def request_totals(served: list[Served]) -> dict[str, float]:
    """Totals over requests; the modelled ones count from the first arrival to the last token."""
    first = np.array([item.first_token - item.arrived for item in served])
    gaps = np.array(
        [
            (item.finished - item.first_token) / (item.output_tokens - 1)
            for item in served
            if item.output_tokens > 1
        ]
        or [0.0]
    )
    seconds = max(item.finished for item in served) - min(item.arrived for item in served)
    output_tokens = sum(item.output_tokens for item in served)
    return {
        "hit_tokens": float(sum(item.hit_tokens for item in served)),
        "prompt_tokens": float(sum(item.prompt_tokens for item in served)),
        "output_tokens": float(output_tokens),
        "recomputed_tokens": float(sum(item.recomputed_tokens for item in served)),
        "retractions": float(sum(item.retractions for item in served)),
        "modelled_seconds": seconds,
        "modelled_tokens_per_s": output_tokens / seconds,
        "ttft_p50": float(np.percentile(first, 50)),
        "ttft_p99": float(np.percentile(first, 99)),
        "itl_p50": float(np.percentile(gaps, 50)),
        "itl_p99": float(np.percentile(gaps, 99)),
    }
