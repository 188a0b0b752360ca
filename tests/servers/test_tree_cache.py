"""The radix cache inside real engines: host-only work, KV events, and why a prefix was not hit."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from sglang_jenga.testing.engines import EngineFailed, run_engine
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.servers import readback

pytestmark = pytest.mark.slow

WINDOW = 32


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_tiny_model("gemma3_text", tmp_path_factory.mktemp("gemma"), window=WINDOW)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def words(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, VOCAB_SIZE) for _ in range(count)]


def branching(seed: int = 0) -> list[list[list[int]]]:
    """Three waves of prompts: new ones, continued ones, and branches off their middles."""
    first = [words(120, seed + i) for i in range(6)]
    second = [prompt + words(40, seed + 10 + i) for i, prompt in enumerate(first)]
    third = [prompt[:70] + words(60, seed + 20 + i) for i, prompt in enumerate(second)]
    return [first, second, third]


# ---- the host is the authority --------------------------------------------------------------

PRESSED = {"max_total_tokens": 1400, "max_new_tokens": 48, "chunked_prefill_size": 64}


@pytest.mark.parametrize("page_size", [1, 16])
def test_no_running_step_reads_a_device_tensor_back(gemma, page_size: int):
    run = run_engine(
        gemma,
        branching(),
        prepare=readback.forbid,
        memory_backend="jenga",
        page_size=page_size,
        **PRESSED,
    )
    assert sum(map(sum, run.cached)) > 0, "the cache was not in use"


def test_the_guard_against_readback_sees_one(gemma):
    with pytest.raises(EngineFailed, match=r"cache.py:2 reads a device tensor back"):
        run_engine(
            gemma, branching(), prepare=readback.forbid_and_plant, memory_backend="jenga", **PRESSED
        )


# ---- KV events ------------------------------------------------------------------------------


def events_to(folder) -> str:
    """SGLang's null publisher does not start, so events go to a socket that nobody reads."""
    return json.dumps({"publisher": "zmq", "endpoint": f"ipc://{folder}/events"})


def print_events() -> None:
    """Let the scheduler print the KV events that it hands to its publisher."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from sglang_jenga.serving.cache import JengaRadixCache

    def printing(take):
        def take_events(self):
            events = take(self)
            for event in events:
                kind = type(event).__name__
                fields = {name: getattr(event, name) for name in event.__struct_fields__}
                print("EVENT", json.dumps({"kind": kind} | fields, default=str), flush=True)
            return events

        return take_events

    for cache in (UnifiedRadixCache, JengaRadixCache):
        cache.take_events = printing(cache.take_events)


def in_sessions() -> None:
    """As `print_events`, and every wave of prompts belongs to a session of its own."""
    from sglang.srt.entrypoints.engine import Engine

    print_events()
    generate, waves = Engine.generate, itertools.count()
    Engine.generate = lambda self, **request: generate(
        self, **request, session_id=f"wave {next(waves)}"
    )


def published(log: str) -> tuple[dict, set]:
    """Blocks that were stored, with parent, tokens and session; and those left at the end."""
    stored, left = {}, set()
    for line in re.findall(r"^EVENT (.*)$", log, flags=re.M):
        event = json.loads(line)
        if event["kind"] == "BlockStored":
            tokens, size = event["token_ids"], event["block_size"]
            parents = [event["parent_block_hash"], *event["block_hashes"]]
            for i, block in enumerate(event["block_hashes"]):
                chunk = tuple(tokens[i * size : (i + 1) * size])
                stored[block] = (parents[i], chunk, event["session_id"])
            left |= set(event["block_hashes"])
        elif event["kind"] == "BlockRemoved":
            assert set(event["block_hashes"]) <= left, "removed what was not there"
            left -= set(event["block_hashes"])
        else:
            left.clear()
    return stored, left


LAST = 3  # `words` never says it


def before_the_last_request(stored: dict, left: set) -> tuple[dict, set]:
    """Without the blocks of the request that begins with `LAST`: what it stores may not have been
    published any more when the engine was stopped, but all before it has."""

    def root(block):
        parent, tokens, _ = stored[block]
        return tokens[0] if parent is None else root(parent)

    kept = {block for block in stored if root(block) != LAST}
    return {block: stored[block] for block in kept}, left & kept


@pytest.mark.parametrize("page_size", [1, 16])
def test_kv_events_are_those_of_stock_sglang(llama, tmp_path, page_size: int):
    found = []
    for backend in ("default", "jenga"):
        run = run_engine(
            llama,
            [*branching(), [[LAST, *words(30, 9)]]],
            prepare=in_sessions,
            memory_backend=backend,
            page_size=page_size,
            kv_events_config=events_to(tmp_path),
        )
        found.append(before_the_last_request(*published(run.log)))
    sessions = {session for _, _, session in found[0][0].values()}
    assert sessions == {"wave 0", "wave 1", "wave 2"}
    assert found[0] == found[1]


def test_kv_events_of_evicted_prefixes_leave_what_the_trees_hold(llama, tmp_path):
    run = run_engine(
        llama,
        list(itertools.chain(branching(0), branching(100), branching(200))),
        prepare=print_events,
        memory_backend="jenga",
        kv_events_config=events_to(tmp_path),
        **(PRESSED | {"max_total_tokens": 1200}),
    )
    stored, left = published(run.log)
    assert left < set(stored), "nothing was evicted"
    assert all(stored[block][0] is None or stored[block][0] in left for block in left)


# ---- why not hit ----------------------------------------------------------------------------


def test_the_log_says_why_a_prefix_was_not_hit(gemma):
    prompt = words(300, 1)
    crowd = [words(300, 50 + i) for i in range(8)]
    run = run_engine(
        gemma,
        [[prompt], crowd, [prompt[:150] + words(20, 2)]],
        memory_backend="jenga",
        max_total_tokens=1000,
        log_level="debug",
    )
    reports = re.findall(r"jenga prefix rid=\S+ looked up (\d+), hit (\d+)(.*)", run.log)
    assert ("299", "0", "; tokens 0-299 are not cached") in reports
    looked_up, hit, reason = reports[-1]
    assert (looked_up, hit) == ("169", "0")
    assert re.match(r"; tokens [\d,]+-169 are not cached", reason)
