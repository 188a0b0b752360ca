"""In the steps of a server, what is ours never makes the host wait for the device."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch

from sglang_jenga.testing.context import Settings
from tests.faces.pools import Pools, Shape
from tests.faces.rig import Rig
from tests.faces.stalls import Card, Device, Stall

WINDOWS = Shape(full=3, window_k=2, window=6, num_large=30, num_rows=2)
STATES = Shape(full=3, state_k=1, num_large=16, num_rows=2)
TRACKED = Settings(strategy="extra_buffer", track_interval=8)


def on_device(pools: Pools) -> list[torch.Tensor]:
    """What a server has there for life: bytes, rows, and what forwards look up."""
    names = (
        "req_index_to_mamba_index_mapping",
        "req_index_to_mamba_ping_pong_track_buffer_mapping",
    )
    tables = [getattr(pools.rows, name, None) for name in names]
    tables += [pools.buffer.bytes, pools.rows.req_to_token]
    tables += [slot_map.tensor for slot_map in pools.allocator.slot_maps.values()]
    return [tensor for tensor in tables if tensor is not None]


def put_on(card: Card, pools: Pools) -> None:
    """Let everything that uploads do it by this card."""
    pools.buffer.ops = card
    if pools.states is not None:
        pools.states.to_device = pools.rows._to_device = card.upload


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(("shape", "settings"), [(WINDOWS, Settings()), (STATES, TRACKED)])
def test_no_step_makes_the_host_wait(shape: Shape, settings: Settings, page_size: int):
    prompt = [1, 0, 2, 0, 1, 1, 2, 0] * 2
    with Rig(shape, settings._replace(page_size=page_size), check=False) as rig:
        device = Device(on_device(rig.pools))
        card = Card(device)
        put_on(card, rig.pools)
        done = Counter()
        with device, counted(card, done):
            first = rig.ask(prompt, 9)
            hit = rig.ask([*prompt, *first.tokens[:8], 2], 2).hit
            for symbol in (2, 0):  # more than the pool holds: pages change hands, and format
                rig.ask([symbol, 2, *prompt], 2)

        assert hit > 0 and card.uploads > 0
        assert not shape.has_states or (done["zero"] > 0 and done["copy"] > 0)


def counted(card: Card, done: Counter):
    """Inside, count what the card is asked to do."""

    def count(name: str):
        work = getattr(card, name)

        def counting(*args):
            done[name] += 1
            work(*args)

        return counting

    return mock.patch.multiple(card, zero=count("zero"), copy=count("copy"))


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (lambda there, here: there.__setitem__(here.to(torch.int64), 0), "value from host memory"),
        (lambda there, here: there.index_fill_(0, here, 0), "tensor in host memory"),
        (lambda there, here: int(there[0]), "reads a value back"),
        (lambda there, here: there[there > 0], "a mask"),
        (lambda there, here: torch.nonzero(there), "a shape"),
    ],
)
def test_a_line_that_waits_is_found(does, why):
    there, here = torch.zeros(4, dtype=torch.int64), torch.tensor([1])

    ours = mock.patch("tests.faces.stalls._our_line", return_value="a line")
    with ours, pytest.raises(Stall, match=why), Device([there]):
        does(there, here)
