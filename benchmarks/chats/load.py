"""Multi-turn chats with branches, played over HTTP against a running SGLang server.

A client holds one conversation and goes on from the real answers; at `branch_at` it parts in
branches that share what was said before. All texts follow from the load and its seed alone, so two
servers that answer alike are asked alike. Prompts are token ids: the client needs no tokenizer, and
knows nothing of models or of what the server does with its memory.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Load:
    """`clients` conversations of `rounds` messages. All texts follow from `seed` alone.

    From round `branch_at` on (counted from 0) a conversation goes on in `branching` branches.
    Lengths are in tokens, ids are drawn below `vocab_size`; `think_time` is the mean of the seconds
    before a message.
    """

    rounds: int = 12
    clients: int = 4
    branching: int = 2
    branch_at: int = 4
    think_time: float = 0.2
    system_tokens: int = 200
    message_tokens: int = 64
    answer_tokens: int = 32
    vocab_size: int = 512
    seed: int = 0

    def branches(self, round_: int) -> int:
        """Requests of one conversation in that round."""
        return 1 if round_ < self.branch_at else self.branching

    def turns(self) -> int:
        return self.clients * sum(self.branches(round_) for round_ in range(self.rounds))

    def turn_tokens(self) -> int:
        return self.message_tokens + self.answer_tokens

    def longest_tokens(self) -> int:
        """What one conversation holds at its end, along one branch."""
        return self.system_tokens + self.rounds * self.turn_tokens()

    def final_tokens(self) -> int:
        """What all conversations hold at their end, shared parts once."""
        return self.system_tokens + self.turns() * self.turn_tokens()

    def draw(self, *place: int | str) -> random.Random:
        """Randomness of one place: no other client, round or server changes what is drawn."""
        return random.Random("/".join(map(str, (self.seed, *place))))

    def tokens(self, count: int, *place: int | str) -> list[int]:
        # The first ids are special in most vocabularies.
        rng = self.draw(*place)
        return [rng.randrange(3, self.vocab_size) for _ in range(count)]


@dataclass(slots=True)
class Turn:
    """One request. `gaps` are seconds between output tokens, `seconds` those of the request.

    After an `error` the conversation goes on with what there is of the answer.
    """

    round: int
    client: int
    branch: int
    prompt_tokens: int
    cached_tokens: int = 0
    ttft: float = 0.0
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True)
class Branch:
    """A client's way through its conversation; `context` is all that was said, as token ids."""

    client: int
    index: int
    context: list[int]


class Player:
    """Plays the load against one server, any rounds at a time, and keeps what it measured."""

    def __init__(self, name: str, url: str, load: Load):
        self.name, self.url, self.load = name, url.rstrip("/"), load
        system = load.tokens(load.system_tokens, "system")
        self.conversations = [[Branch(client, 0, list(system))] for client in range(load.clients)]
        self.turns: list[Turn] = []
        self.seconds = 0.0

    async def play(self, http: aiohttp.ClientSession, rounds: Iterable[int], bar: tqdm) -> None:
        """Go on with all conversations for `rounds`, which follow those played before."""
        start = time.perf_counter()
        chats = (self._converse(http, branches, rounds, bar) for branches in self.conversations)
        await asyncio.gather(*chats)
        self.seconds += time.perf_counter() - start

    async def _converse(
        self,
        http: aiohttp.ClientSession,
        branches: list[Branch],
        rounds: Iterable[int],
        bar: tqdm,
    ) -> None:
        """Play `rounds` of one conversation; branches wait for the trunk, not for each other."""
        trunk = branches[0]
        shared = [round_ for round_ in rounds if round_ < self.load.branch_at]
        apart = [round_ for round_ in rounds if round_ >= self.load.branch_at]
        await self._follow(http, trunk, shared, bar)
        if apart:
            for index in range(len(branches), self.load.branching):
                branches.append(Branch(trunk.client, index, list(trunk.context)))
            await asyncio.gather(*(self._follow(http, each, apart, bar) for each in branches))

    async def _follow(
        self, http: aiohttp.ClientSession, branch: Branch, rounds: Iterable[int], bar: tqdm
    ) -> None:
        load = self.load
        for round_ in rounds:
            place = (branch.client, branch.index, round_)
            if load.think_time:
                # Exponential: arrivals are a Poisson process, so requests meet in every way.
                await asyncio.sleep(load.draw("think", *place).expovariate(1 / load.think_time))
            branch.context += load.tokens(load.message_tokens, "message", *place)
            turn = Turn(round_, branch.client, branch.index, len(branch.context))
            await ask(http, self.url, branch.context, load.answer_tokens, turn)
            branch.context += turn.output_ids
            self.turns.append(turn)
            bar.set_postfix_str(f"{self.name}, round {round_ + 1}", refresh=False)
            bar.update()


async def ask(
    http: aiohttp.ClientSession, url: str, prompt: Sequence[int], answer_tokens: int, turn: Turn
) -> None:
    """Stream one greedy answer into `turn`; a failure becomes its `error`."""
    sampling = {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
    start = last = time.perf_counter()
    count = 0
    try:
        async with http.post(f"{url}/generate", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{reply.status} {await reply.text()}")
            async for event in events(reply.content):
                now = time.perf_counter()
                if "error" in event:
                    raise RuntimeError(event["error"])
                meta = event["meta_info"]
                new = meta["completion_tokens"] - count
                if new <= 0:
                    continue
                if count:
                    # A chunk may carry several tokens: they share the time since the last one.
                    turn.gaps += [(now - last) / new] * new
                else:
                    turn.ttft = now - start
                    turn.cached_tokens = meta["cached_tokens"]
                count, last = count + new, now
                ids = event["output_ids"]
                # All ids so far, unless the server streams increments.
                turn.output_ids = ids if len(ids) == count else turn.output_ids + ids
        if count < answer_tokens:
            raise RuntimeError(f"the stream ended after {count} of {answer_tokens} tokens")
    except (aiohttp.ClientError, OSError, RuntimeError, ValueError, KeyError) as error:
        turn.error = f"{type(error).__name__}: {error}"
    turn.seconds = time.perf_counter() - start


async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    """The JSON objects of a stream of server-sent events, until `[DONE]`."""
    async for line in lines:
        if line.startswith(b"data:"):
            data = line[len(b"data:") :].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


async def play(players: Sequence[Player], load: Load) -> None:
    """Play the whole load on every player's server, with a progress bar on stderr.

    A single one plays freely. Several take turns round by round, so that none disturbs another and
    a slow moment of the machine hits all.
    """
    # No limit on connections or time: what the server queues is what is measured.
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    bar = tqdm(total=load.turns() * len(players), unit="turn", file=sys.stderr, smoothing=0.05)
    # An event with a long answer may be longer than the lines that aiohttp reads by default.
    http = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22)
    with bar:
        async with http:
            if len(players) == 1:
                await players[0].play(http, range(load.rounds), bar)
                return
            for round_ in range(load.rounds):
                # Whoever comes second may find the machine in another state: they change places.
                for player in players if round_ % 2 == 0 else reversed(players):
                    await player.play(http, [round_], bar)
