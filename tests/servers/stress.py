"""Requests, aborts and disconnects on a pool four times too small: nothing may be lost.

    python -m tests.servers.stress                  # 2,000 requests
    python -m tests.servers.stress --requests 200 --family qwen3_next

A real server over HTTP. Every third request is aborted or its connection dropped at a random
moment. The server must live, every finished answer must equal the unpressured one, and at the end
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

from sglang_jenga.testing.families import EXACT
from sglang_jenga.testing.servers import Server
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


class Job(NamedTuple):
    """A prompt, its answer's length, and how and after how many tokens it ends early."""

    prompt: list[int]
    new_tokens: int
    quits: tuple[str, int] | None = None


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
    jobs = [rng.choice(distinct) for _ in range(count)]
    return [
        job._replace(quits=(rng.choice(("abort", "drop")), rng.randrange(job.new_tokens)))
        if index % 3 == 0
        else job
        for index, job in enumerate(jobs)
    ]


async def _play(url: str, jobs: list[Job]) -> list[list[int] | None]:
    """Answers in order; None for those that quit."""
    limit = asyncio.Semaphore(CONCURRENCY)
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
        "input_ids": job.prompt,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": job.new_tokens,
        },
        "stream": True,
    }
    output: list[int] = []
    async with session.post(f"{url}/generate", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(event["error"])
            output = event["output_ids"]
            if job.quits is not None and len(output) >= job.quits[1]:
                if job.quits[0] == "abort":  # by prefix in SGLang: rids are of one length
                    async with session.post(f"{url}/abort_request", json={"rid": rid}):
                        pass
                return None  # leaving the block drops the connection
    return output


def stress(
    model: Path,
    count: int,
    *flags: str,
    states: int = 0,
    launchers: Sequence[WarmLauncher | None] = (None, None),
) -> Report:
    """Play the jobs unpressured for the expected answers, then under pressure.

    ``states``: so many states' bytes are in the small pool besides, for models that have any.
    ``launchers``: of the two servers; SGLang reads `RETRACTING` when it is imported.
    """
    jobs = jobs_of(count)
    distinct = {(tuple(job.prompt), job.new_tokens): job._replace(quits=None) for job in jobs}
    common = ("--memory-backend", "jenga", "--chunked-prefill-size", "64", *flags)
    roomy = ("--max-total-tokens", "8192", "--max-mamba-cache-size", "100")
    roomy = roomy[: 4 if states else 2]
    with Server(model, *common, *roomy, env=EXACT, launcher=launchers[0]) as server:
        answers = asyncio.run(_play(server.url, list(distinct.values())))
    expected = dict(zip(distinct, answers, strict=True))

    # Admission that bets on early ends: the bets it loses are paid by retraction.
    pool = ("--max-total-tokens", str(POOL_TOKENS), "--schedule-conservativeness", "0.1")
    if states:
        pool += ("--max-mamba-cache-size", str(states))
    pressed = STRICT | RETRACTING | EXACT
    with Server(model, *common, *pool, env=pressed, launcher=launchers[1]) as server:
        start = time.monotonic()
        answers = asyncio.run(_play(server.url, jobs))
        seconds = time.monotonic() - start
        time.sleep(3)  # SGLang's idle checks run in this time
        server.flush_cache()
        time.sleep(1)
        alive = server.alive() and len(server.generate([jobs[1].prompt], 4)[0].output_ids) == 4
        log = server.log()
    if not alive:
        raise RuntimeError(f"the server did not survive\n{log[-3000:]}")
    wrong = sum(
        answer is not None and answer != expected[tuple(job.prompt), job.new_tokens]
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
        layers = None if has_states else 6
        model = write_tiny_model(
            options.family, Path(folder) / "model", num_layers=layers, window=32
        )
        report = stress(model, options.requests, *flags, states=POOL_STATES * has_states)
    print(report)
    print("nothing lost" if report.clean else "SOMETHING WAS LOST")
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
