"""Why `--disaggregation-transfer-backend nixl` is refused: what SGLang's own code for it makes of
our regions, over an agent that copies bytes inside this process. NIXL itself never runs here.

KV, states and the layers of a lone group arrive whole. Windows do where SGLang prepares its
transfers of states ahead; where it does not, nothing is sent of them and nobody is told.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.memory.kv import JengaHybridPool, JengaMHAPool, JengaSWAPool
from sglang_jenga.memory.layout import layout_name
from sglang_jenga.memory.state import JengaStatePool, StatePart, StateShape
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.context import configured

HEADS, NARROW = HeadShape(num_heads=2, k_dim=8, v_dim=8), HeadShape(num_heads=1, k_dim=8, v_dim=8)
DTYPE = torch.float32
FULL, OTHER = 0, 1
PAGES = {FULL: ([2, 3, 7, 5], [9, 4, 5, 1])}
"""Small pages of the prefill server, and of the decode server: runs and single ones."""
WINDOWS = ([4, 5, 8], [6, 7, 3])
STATES = ([6], [11])


class Side(NamedTuple):
    """The pool of one server: its bytes, and what SGLang has of it."""

    buffer: PoolBuffer
    pool: Any


def lone(page_size: int, megabytes: int) -> Side:
    group = LayerGroup(Full(), (0, 1), HEADS.entry_bytes(2, 4), page_size)
    buffer = PoolBuffer(plan_pool([group], megabytes << 20), "cpu", enable_memory_saver=False)
    return Side(buffer, JengaMHAPool(buffer, FULL, HEADS, DTYPE, enable_alt_stream=False))


def windows(page_size: int, megabytes: int) -> Side:
    groups = [
        LayerGroup(Full(), (0, 3), HEADS.entry_bytes(2, 4), page_size),
        LayerGroup(Window(8), (1, 2, 4), NARROW.entry_bytes(3, 4), page_size),
    ]
    buffer = PoolBuffer(plan_pool(groups, megabytes << 20), "cpu", enable_memory_saver=False)
    return Side(buffer, JengaSWAPool(buffer, (HEADS, NARROW), DTYPE, enable_alt_stream=False))


def states(page_size: int, megabytes: int) -> Side:
    shape = StateShape(
        (0, 1, 3), StatePart(0, (4, 8), DTYPE), (StatePart(384, (12, 3), DTYPE),), 384 + 3 * 144
    )
    groups = [
        LayerGroup(Full(), (2,), HEADS.entry_bytes(1, 4), page_size),
        LayerGroup(State(), shape.layer_ids, shape.entry_bytes, element=shape.element),
    ]
    buffer = PoolBuffer(plan_pool(groups, megabytes << 20), "cpu", enable_memory_saver=False)
    full = JengaMHAPool(buffer, FULL, HEADS, DTYPE, enable_alt_stream=False)
    pool = JengaHybridPool(
        size=full.size,
        dtype=DTYPE,
        page_size=page_size,
        head_num=full.head_num,
        head_dim=full.head_dim,
        full_attention_layer_ids=[2],
        device="cpu",
        mamba_pool=JengaStatePool(buffer, OTHER, shape),
        full_kv_pool=full,
        start_layer=0,
    )
    return Side(buffer, pool)


class Agent:
    """What SGLang calls of NIXL's agent. A write is a copy, inside what both sides registered."""

    known: ClassVar[dict[str, Agent]] = {}
    strided = True
    """Whether it takes runs, as newer versions of NIXL do."""

    def __init__(self, name: str, config: object) -> None:
        self.name, self.registered = name, []
        Agent.known[name] = self

    def create_backend(self, name: str, parameters: object) -> None:
        pass

    def get_plugin_list(self) -> list[str]:
        return ["UCX"]

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> None:
        assert metadata.decode() in Agent.known

    def register_memory(self, blocks: list[tuple], kind: str) -> list[tuple]:
        self.registered += [(block[0], block[1]) for block in blocks]
        return blocks or [()]

    def get_xfer_descs(self, blocks: Any, kind: str) -> list[list[int]]:
        return np.array(blocks, dtype=np.int64)[:, :2].tolist()

    def prep_xfer_dlist(self, peer: str, blocks: Any, kind: str) -> tuple[str, np.ndarray]:
        """Where blocks begin and how long they are, ``[num_blocks, 2]``."""
        if isinstance(blocks, np.ndarray):  # runs: address, length, device, stride, count
            if not self.strided:
                raise TypeError
            runs = [
                np.stack([at + step * np.arange(n), np.full(n, size)], axis=1)
                for at, size, _, step, n in blocks.tolist()
            ]
            blocks = np.concatenate(runs)
        return peer, np.array(blocks, dtype=np.int64)

    def make_prepped_xfer(self, how: str, source: tuple, src: Any, target: tuple, dst: Any) -> Any:
        assert (how, source[0]) == ("WRITE", "")
        return target[0], source[1][src].tolist(), target[1][dst].tolist()

    def initialize_xfer(self, how: str, source: list, target: list, peer: str) -> Any:
        assert how == "WRITE"
        return peer, source, target

    def transfer(self, handle: tuple) -> str:
        peer, sources, targets = handle
        for (source, size), (target, room) in zip(sources, targets, strict=True):
            assert size == room
            for agent, at in ((self, source), (Agent.known[peer], target)):
                assert any(begin <= at <= at + size <= begin + n for begin, n in agent.registered)
            ctypes.memmove(target, source, size)
        return "DONE"


@pytest.fixture(autouse=True)
def nixl(monkeypatch) -> Iterator[Any]:
    """SGLang's module for NIXL, its manager without sockets, threads and the real agent."""
    with configured():
        from sglang.srt.disaggregation.common.conn import CommonKVManager
        from sglang.srt.disaggregation.nixl import conn

        api = ModuleType("nixl._api")
        api.nixl_agent, api.nixl_agent_config = Agent, SimpleNamespace
        api.nixl_thread_sync_t = SimpleNamespace(NIXL_THREAD_SYNC_STRICT=0)
        monkeypatch.setitem(sys.modules, "nixl._api", api)
        monkeypatch.setitem(sys.modules, "nixl", ModuleType("nixl"))
        monkeypatch.setattr(Agent, "known", {})
        monkeypatch.setattr(CommonKVManager, "__init__", without_sockets)
        for name in ("_start_bootstrap_thread", "_start_decode_listener_thread"):
            monkeypatch.setattr(conn.NixlKVManager, name, lambda self: None)
        monkeypatch.setattr(CommonKVManager, "_start_heartbeat_checker_thread", lambda self: None)
        monkeypatch.setattr(conn.NixlKVManager, "transfer_worker", lambda *args: None)
        yield conn


def without_sockets(self: Any, args: Any, mode: Any, server_args: Any, mla: bool) -> None:
    """What SGLang's constructor for all backends sets and this one reads; one rank each."""
    self.kv_args, self.disaggregation_mode = args, mode
    self.is_mla_backend, self.is_hybrid_mla_backend = mla, False
    self.attn_tp_size = self.state_tp_size = self.attn_cp_size = self.pp_size = self.dcp_size = 1
    self.dcp_rank, self.local_ip, self.rank_port = 0, "127.0.0.1", 1
    self.decode_kv_args_table = {}


def manager(conn: Any, side: Side, mode: str, *, prepares: bool) -> Any:
    """One server's, of what SGLang asks of its pool. ``prepares``: states ahead, as on CUDA."""
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.disaggregation.utils import (
        DisaggregationMode,
        build_kv_layer_ids,
        get_kv_transfer_buf_infos,
        setup_state_kv_args,
    )

    from sglang_jenga.serving.transfers import kv_layer_ids

    args = KVArgs()
    args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = get_kv_transfer_buf_infos(side.pool)
    named = build_kv_layer_ids(
        token_to_kv_pool=side.pool,
        draft_token_to_kv_pool=None,
        num_draft_entries=0,
        num_hidden_layers=5,
    )
    args.kv_layer_ids = kv_layer_ids(named, token_to_kv_pool=side.pool)
    args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = [], [], []
    args.ib_device, args.gpu_id, args.engine_rank, args.prefill_start_layer = None, 0, 0, 0
    args.page_size = side.pool.page_size
    setup_state_kv_args(args, side.pool, None, 5, req_to_token_pool=None)
    made = conn.NixlKVManager(args, DisaggregationMode(mode), None, False)
    if prepares:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conn, "get_device", lambda: SimpleNamespace(device="cuda"))
            made._prepared_state_components = made._prepared_state_component_indices("UCX")
    return made


def send(conn: Any, source: Side, target: Side, others: tuple | None, *, prepares: bool) -> Any:
    """All pages of one request, with the calls of SGLang's `transfer_worker`; what the prefill
    server's agent registered."""
    assert layout_name(source.buffer.plan, 1) == layout_name(target.buffer.plan, 1)
    prefill = manager(conn, source, "prefill", prepares=prepares)
    decode = manager(conn, target, "decode", prepares=False)
    message = decode.build_receiver_registration_message()
    peer = conn.KVArgsRegisterInfo.from_zmq(message[1:])
    prefill._add_remote_peer(peer)
    src, dst = (np.array(pages, dtype=np.int32) for pages in PAGES[FULL])
    assert prefill.send_kvcache(
        peer.agent_name,
        src,
        peer.dst_kv_ptrs,
        dst,
        peer.gpu_id,
        dst_mem_kind=peer.dst_homogeneous_mem_kind,
    )
    if others:
        for _ in prefill.maybe_send_extra(
            peer.agent_name,
            [others[0]],
            peer.dst_state_data_ptrs,
            [others[1]],
            peer.gpu_id,
            peer.decode_tp_size,
            decode_tp_rank=peer.decode_tp_rank,
            dst_state_item_lens=peer.dst_state_item_lens,
            dst_state_dim_per_tensor=peer.dst_state_dim_per_tensor,
            dst_state_layer_ids=peer.dst_state_layer_ids,
        ):
            pass
    return prefill.agent.registered


def two_sides(build: Callable[[int, int], Side], page_size: int) -> tuple[Side, Side]:
    """Pools of two sizes, every byte of them a random one."""
    sides = build(page_size, 4), build(page_size, 8)
    for seed, side in enumerate(sides):
        random = torch.Generator().manual_seed(seed)
        side.buffer.bytes.random_(0, 256, generator=random)
    return sides


def copied(source: Side, target: Side, pages: dict[int, tuple]) -> torch.Tensor:
    """The target's bytes if those small pages of each group, and nothing else, came whole."""
    result = target.buffer.bytes.clone()
    for group_id, (src, dst) in pages.items():
        size = source.buffer.plan.groups[group_id].small_page_bytes
        for at, to in zip(src, dst, strict=True):
            page = source.buffer.bytes[at * size : (at + 1) * size]
            result[to * size : (to + 1) * size] = page
    return result


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("strided", [True, False])
def test_a_lone_group_arrives_layer_by_layer(nixl, monkeypatch, page_size: int, strided: bool):
    monkeypatch.setattr(Agent, "strided", strided)
    source, target = two_sides(lone, page_size)
    before = target.buffer.bytes.clone()

    send(nixl, source, target, None, prepares=False)

    found = target.buffer.bytes.clone()
    target.buffer.bytes.copy_(before)
    for name in ("k_buffer", "v_buffer"):
        ours, theirs = getattr(source.pool, name), getattr(target.pool, name)
        for have, gets in zip(ours, theirs, strict=True):
            for at, to in zip(*PAGES[FULL], strict=True):
                rows = slice(at * page_size, (at + 1) * page_size)
                gets[to * page_size : (to + 1) * page_size] = have[rows]
    assert torch.equal(found, target.buffer.bytes)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("build", "others", "prepares", "strided"),
    [
        (states, STATES, True, True),
        (states, STATES, True, False),
        (states, STATES, False, True),
        (windows, WINDOWS, True, True),
    ],
)
def test_small_pages_arrive_whole_and_nothing_beside_them(
    nixl, monkeypatch, build, others, prepares: bool, strided: bool, page_size: int
):
    monkeypatch.setattr(Agent, "strided", strided)
    source, target = two_sides(build, page_size)
    expected = copied(source, target, {**PAGES, OTHER: others})

    send(nixl, source, target, others, prepares=prepares)

    assert torch.equal(target.buffer.bytes, expected)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("prepares", "strided"), [(True, False), (False, True)])
def test_of_windows_nothing_is_sent_where_sglang_prepares_no_transfers_of_states(
    nixl, monkeypatch, prepares: bool, strided: bool, page_size: int
):
    """So nixl is refused: SGLang takes the first half of the regions for keys, and of one there is
    none. With a SGLang that sends them this fails, and nixl may be served."""
    monkeypatch.setattr(Agent, "strided", strided)
    source, target = two_sides(windows, page_size)
    without = copied(source, target, PAGES)

    send(nixl, source, target, WINDOWS, prepares=prepares)

    assert torch.equal(target.buffer.bytes, without)


@pytest.mark.parametrize(("build", "others"), [(windows, WINDOWS), (states, STATES)])
def test_a_pool_of_two_groups_is_registered_twice(nixl, build, others):
    """The other reason: SGLang's code for Mooncake leaves the second one out, here it comes."""
    source, target = two_sides(build, 16)

    registered = send(nixl, source, target, others, prepares=True)

    whole = (source.buffer.bytes.data_ptr(), source.buffer.plan.pool_bytes)
    assert registered == [whole, whole]
