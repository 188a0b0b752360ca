"""Requests, aborts and disconnects on a pool four times too small: nothing may be lost.

    python -m tests.servers.stress                  # 2,000 requests
    python -m tests.servers.stress --requests 200 --family qwen3_next
    python -m tests.servers.stress --family mllama  # pictures, which many prompts share

A real server over HTTP. Every third request is aborted or its connection dropped at a random
moment; of those with pictures some before their first token. The server must live, every finished
answer must equal the unpressured one (with pictures: stock SGLang's to each prompt alone, without a
cache), and at the end
the pool must be entirely empty or evictable and every large page must come back from /flush_cache,
with SGLang's strict leak checks on all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from sglang_jenga.testing.engines import Pictured, Prompt
from sglang_jenga.testing.families import EXACT
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_mllama import picture, prompt, write_tiny_mllama
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE, write_tiny_model
from sglang_jenga.testing.warm import WarmLauncher

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}
# Now and then somebody is retracted, whatever the pool has room for.
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
CONCURRENCY = 32
# Stock's bytes for so many tokens; the concurrent requests want about four times that.
POOL_TOKENS = 340
POOL_STATES = 8
WORDS = ("what", "is", "this", "that", "and", "the", "how", "many", "red", "blue", "of", "picture")
TILES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 3))


class Job(NamedTuple):
    """A prompt, its answer's length, and how and after how many tokens it ends early; with -1 it
    does not wait for any."""

    prompt: Prompt
    new_tokens: int
    quits: tuple[str, int] | None = None

    @property
    def question(self) -> tuple[tuple[Any, ...], int]:
        """What its answer depends on."""
        return tuple(self.prompt), self.new_tokens


class Report(NamedTuple):
    finished: int
    aborted: int
    dropped: int
    wrong: int
    retractions: int
    flushed: tuple[int, int]
    seconds: float

    @property
    def clean(self) -> bool:
        return self.wrong == 0 and self.flushed[0] == self.flushed[1]


def jobs_of(count: int, seed: int = 0) -> list[Job]:
    """Random lengths; prompts share systems and repeat, so that cached prefixes come into play."""
    rng = random.Random(seed)

    def tokens(number: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(number)]

    systems = [tokens(length) for length in (10, 40, 80)]
    distinct = [
        Job(rng.choice(systems) + tokens(rng.randrange(1, 80)), rng.randrange(2, 24))
        for _ in range(max(8, count // 8))
    ]
    return _some_quit([rng.choice(distinct) for _ in range(count)], rng)


def pictured_jobs_of(count: int, seed: int = 0) -> list[Job]:
    """Prompts of up to three pictures out of a few, in any order, and texts that begin alike."""
    rng = random.Random(seed)
    pictures = [picture(number, *tiles) for number, tiles in enumerate(TILES)]

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    systems = [text(length) for length in (0, 4, 12)]

    def made() -> Job:
        shown = rng.choices(pictures, k=rng.choice((0, 1, 1, 2, 2, 3)))
        asked = f"{rng.choice(systems)} {text(rng.randrange(1, 16))}?"
        return Job(prompt(asked, *shown), rng.randrange(2, 24))

    distinct = [made() for _ in range(max(8, count // 8))]
    return _some_quit([rng.choice(distinct) for _ in range(count)], rng, earliest=-1)


def _some_quit(jobs: list[Job], rng: random.Random, *, earliest: int = 0) -> list[Job]:
    return [
        job._replace(quits=(rng.choice(("abort", "drop")), rng.randrange(earliest, job.new_tokens)))
        if index % 3 == 0
        else job
        for index, job in enumerate(jobs)
    ]


async def _play(url: str, jobs: list[Job], concurrency: int) -> list[list[int] | None]:
    """Answers in order; None for those that quit."""
    limit = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(index: int, job: Job) -> list[int] | None:
            async with limit:
                return await _request(session, url, f"job-{index:06}", job)

        return await asyncio.gather(*(one(index, job) for index, job in enumerate(jobs)))


async def _request(
    session: aiohttp.ClientSession, url: str, rid: str, job: Job
) -> list[int] | None:
    body: dict[str, Any] = {
        "rid": rid,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": job.new_tokens,
        },
        "stream": True,
    }
    if isinstance(job.prompt, Pictured):
        body |= {"text": job.prompt.text, "image_data": list(job.prompt.images) or None}
    else:
        body["input_ids"] = job.prompt
    output: list[int] = []
    async with session.post(f"{url}/generate", json=body) as reply:
        reply.raise_for_status()
        if job.quits is not None and job.quits[1] < 0:
            await _quit(session, url, rid, job.quits[0])
            return None
        async for line in reply.content:
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(event["error"])
            output = event["output_ids"]
            if job.quits is not None and len(output) >= job.quits[1]:
                await _quit(session, url, rid, job.quits[0])
                return None
    return output


async def _quit(session: aiohttp.ClientSession, url: str, rid: str, how: str) -> None:
    """Abort, or nothing: whoever leaves drops the connection."""
    if how == "abort":  # by prefix in SGLang: rids are of one length
        async with session.post(f"{url}/abort_request", json={"rid": rid}):
            pass


def stress(
    model: Path,
    jobs: list[Job],
    *flags: str,
    states: int = 0,
    launchers: Sequence[WarmLauncher | None] = (None, None),
) -> Report:
    """Play the jobs unpressured for the expected answers, then under pressure.

    ``states``: so many states' bytes are in the small pool besides, for models that have any.
    ``launchers``: of the two servers; SGLang reads `RETRACTING` when it is imported.
    """
    distinct = {job.question: job._replace(quits=None) for job in jobs}
    pictured = isinstance(jobs[0].prompt, Pictured)
    ours = ("--memory-backend", "jenga")
    common = ("--chunked-prefill-size", "64", *flags)
    if pictured:  # whom one is batched with changes stock's answers
        common = ("--mem-fraction-static", "0.5", *flags)  # SGLang cuts no such prompt
    roomy = ("--max-total-tokens", "8192", *(("--max-mamba-cache-size", "100") if states else ()))
    roomy += ("--disable-radix-cache",) if pictured else ours
    with Server(model, *common, *roomy, env=EXACT, launcher=launchers[0]) as server:
        concurrency = 1 if pictured else CONCURRENCY
        answers = asyncio.run(_play(server.url, list(distinct.values()), concurrency))
    expected = dict(zip(distinct, answers, strict=True))

    # Admission that bets on early ends: the bets it loses are paid by retraction.
    pool = (*ours, "--max-total-tokens", str(POOL_TOKENS), "--schedule-conservativeness", "0.1")
    if states:
        pool += ("--max-mamba-cache-size", str(states))
    pressed = STRICT | RETRACTING | EXACT
    with Server(model, *common, *pool, env=pressed, launcher=launchers[1]) as server:
        start = time.monotonic()
        answers = asyncio.run(_play(server.url, jobs, CONCURRENCY))
        seconds = time.monotonic() - start
        time.sleep(3)  # SGLang's idle checks run in this time
        server.flush_cache()
        time.sleep(1)
        alive = server.alive() and len(server.generate([jobs[1].prompt], 4)[0].output_ids) == 4
        log = server.log()
    if not alive:
        raise RuntimeError(f"the server did not survive\n{log[-3000:]}")
    wrong = sum(
        answer is not None and answer != expected[job.question]
        for job, answer in zip(jobs, answers, strict=True)
    )
    empty, total = re.findall(r"jenga flush: (\d+) of (\d+) large pages empty", log)[-1]
    quit_by = [job.quits[0] for job in jobs if job.quits is not None]
    return Report(
        finished=sum(answer is not None for answer in answers),
        aborted=quit_by.count("abort"),
        dropped=quit_by.count("drop"),
        wrong=wrong,
        retractions=sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))),
        flushed=(int(empty), int(total)),
        seconds=seconds,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--family", default="gemma3_text")
    options, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="tiny-models-") as folder:
        has_states = options.family in STATE_FAMILIES
        jobs = jobs_of(options.requests)
        if options.family == "mllama":
            model, jobs = write_tiny_mllama(Path(folder)), pictured_jobs_of(options.requests)
        else:
            layers = None if has_states else 6
            model = write_tiny_model(
                options.family, Path(folder) / "model", num_layers=layers, window=32
            )
        report = stress(model, jobs, *flags, states=POOL_STATES * has_states)
    print(report)
    print("nothing lost" if report.clean else "SOMETHING WAS LOST")
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
