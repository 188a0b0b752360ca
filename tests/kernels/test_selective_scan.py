"""The recurrence of Mamba-1 over packed prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

POISON = 777.0


class Batch(NamedTuple):
    """The arguments of `selective_scan`, drawn at random: some sequences begin from a state."""

    arguments: dict[str, torch.Tensor]
    begins: list[int]

    def of(self, names: str) -> list[torch.Tensor]:
        return [self.arguments[name].cpu() for name in names.split()]


def batch(
    lengths: list[int],
    *,
    dim: int = 8,
    numbers: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens, count = sum(lengths), len(lengths)
    begins = [sum(lengths[:index]) for index in range(count + 1)]
    slots = torch.randperm(3 * count + 1, generator=generator)[:count]
    # A slot is part of an entry that other layers share, as in a pool.
    states = draw(3 * count + 1, dim, numbers)
    if strided:
        whole = torch.full((3 * count + 1, 3, dim, numbers), POISON)
        whole[:, 1] = states
        states = whole.to(device)[:, 1]
    width = 2 * dim if strided else dim  # x and gate are halves of one projection
    projected = draw(tokens, width).to(dtype).to(device)
    arguments = {
        "x": projected[:, :dim],
        "dt": (draw(tokens, dim) * 3).to(dtype),
        "gate": projected[:, width - dim :],
        "a": -torch.rand(dim, numbers, generator=generator),
        "b": draw(tokens, numbers).to(dtype),
        "c": draw(tokens, numbers).to(dtype),
        "d": draw(dim),
        "states": states,
        "slots": slots,
        "starts": torch.tensor(begins),
        "has_initial": torch.arange(count) % 2 == 1,
        "out": torch.full((tokens, dim), POISON, dtype=dtype),
    }
    return Batch({name: tensor.to(device) for name, tensor in arguments.items()}, begins)


def by_token(drawn: Batch) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The definition, one token after another in float64: outputs, and per sequence the state
    before each token and after the last."""
    x, dt, gate, a, b, c, d, states = (
        part.double() for part in drawn.of("x dt gate a b c d states")
    )
    slots, has_initial = drawn.of("slots has_initial")
    dt = torch.nn.functional.softplus(dt)
    out, history = torch.empty(x.shape, dtype=torch.float64), []
    for index in range(len(slots)):
        state = states[slots[index]] if has_initial[index] else torch.zeros_like(a)
        seen = [state]
        for t in range(drawn.begins[index], drawn.begins[index + 1]):
            state = (dt[t][:, None] * a).exp() * state + (dt[t] * x[t])[:, None] * b[t]
            y = (state * c[t]).sum(-1) + d * x[t]
            out[t] = y * torch.nn.functional.silu(gate[t])
            seen.append(state)
        history.append(seen)
    return out, history


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.cpu().double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 7], [2, 0, 4], [0], [0, 6]])
@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (33, 16)], ids=str)
def test_every_sequence_runs_from_its_state_and_leaves_its_last_one(load, device, lengths, shape):
    drawn = batch(lengths, dim=shape[0], numbers=shape[1], device=device, strided=True)
    want, history = by_token(drawn)
    before = drawn.arguments["states"].clone()

    load("selective_scan").selective_scan(**drawn.arguments)

    close(drawn.arguments["out"], want)
    states, slots = drawn.arguments["states"], drawn.arguments["slots"].tolist()
    ran = {slot: seen for slot, seen in zip(slots, history, strict=True) if len(seen) > 1}
    for slot in range(len(states)):
        if slot in ran:
            close(states[slot], ran[slot][-1])
        else:
            assert torch.equal(states[slot], before[slot])


def test_the_bytes_beside_a_strided_state_stay(load, device):
    drawn = batch([3, 4], device=device, strided=True)
    states = drawn.arguments["states"]

    load("selective_scan").selective_scan(**drawn.arguments)

    whole = states.as_strided((len(states), 3, 8, 4), (96, 32, 4, 1), 0)
    assert (whole[:, [0, 2]] == POISON).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_each_width_are_summed_in_float32(load, device, dtype):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")
    drawn = batch([6, 3], device=device, dtype=dtype)
    want, history = by_token(drawn)

    load("selective_scan").selective_scan(**drawn.arguments)

    close(drawn.arguments["out"], want, dtype)
    close(drawn.arguments["states"][drawn.arguments["slots"][0]], history[0][-1])


def test_a_negative_slot_keeps_nothing(load, device):
    drawn = batch([4, 3], device=device)
    drawn.arguments["slots"][1] = -1
    drawn.arguments["has_initial"][:] = False
    want, _ = by_token(drawn)
    before = drawn.arguments["states"].clone()

    load("selective_scan").selective_scan(**drawn.arguments)

    close(drawn.arguments["out"], want)
    others = [s for s in range(len(before)) if s != int(drawn.arguments["slots"][0])]
    assert torch.equal(drawn.arguments["states"][others], before[others])


@pytest.mark.parametrize("offsets", [(3, 1, 5), (7, 2, 1), (-1, 2, -1), (0, 0, 0)])
def test_a_state_from_inside_a_prompt_is_left_where_it_is_wanted(load, device, offsets):
    drawn = batch([7, 2, 5], device=device)
    _, history = by_token(drawn)
    free = sorted(set(range(10)) - set(drawn.arguments["slots"].tolist()))[:3]
    ends = [
        begin + offset if offset >= 0 else -1
        for begin, offset in zip(drawn.begins, offsets, strict=False)
    ]
    free[1] = -1 if offsets[0] == 7 else free[1]
    before = drawn.arguments["states"].clone()

    load("selective_scan").selective_scan(
        **drawn.arguments,
        snapshot_ends=torch.tensor(ends, device=device),
        snapshot_slots=torch.tensor(free, device=device),
    )

    states, slots = drawn.arguments["states"], drawn.arguments["slots"].tolist()
    for index, (offset, slot) in enumerate(zip(offsets, free, strict=True)):
        close(states[slots[index]], history[index][-1])
        if offset > 0 and slot >= 0:
            close(states[slot], history[index][offset])
        elif slot >= 0:
            assert torch.equal(states[slot], before[slot])


def test_states_may_have_any_strides(load, device):
    drawn = batch([4, 3], device=device)
    _, history = by_token(drawn)
    slots_last = drawn.arguments["states"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    drawn.arguments["states"] = slots_last

    load("selective_scan").selective_scan(**drawn.arguments)

    for slot, seen in zip(drawn.arguments["slots"].tolist(), history, strict=True):
        close(slots_last[slot], seen[-1])


def test_small_steps_are_not_rounded_off(load, device):
    """log(1 + e^x) of a strongly negative x, taken naively, has lost most of its digits."""
    drawn = batch([2], device=device)
    drawn.arguments["dt"][:] = torch.linspace(-16, 30, 16, device=device).view(2, 8)
    drawn.arguments["d"][:] = 0
    want, _ = by_token(drawn)

    load("selective_scan").selective_scan(**drawn.arguments)

    torch.testing.assert_close(drawn.arguments["out"].cpu().double(), want, rtol=1e-5, atol=1e-12)


def plain(drawn: Batch, **more: Any) -> torch.Tensor:
    from sglang_jenga.kernels.selective_scan import selective_scan_reference

    selective_scan_reference(**drawn.arguments, **more)
    return drawn.arguments["out"]


@pytest.mark.parametrize("seed", range(4))
def test_plain_torch_answers_what_the_kernel_answers(load, device, seed, monkeypatch):
    """In blocks of a few tokens, with snapshots at random places and a padded prompt."""
    from sglang_jenga.kernels import selective_scan

    monkeypatch.setattr(selective_scan, "REFERENCE_NUMBERS", 100)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (4,), generator=generator).tolist()
    ours, theirs = (batch(lengths, dim=3, device=device, seed=seed) for _ in range(2))
    free = sorted(set(range(13)) - set(ours.arguments["slots"].tolist()))
    ends = [
        begin + int(torch.randint(0, length + 1, (), generator=generator))
        for begin, length in zip(ours.begins, lengths, strict=False)
    ]
    snapshots = {
        "snapshot_ends": torch.tensor(ends, device=device),
        "snapshot_slots": torch.tensor([*free[:3], -1], device=device),
    }
    for drawn in (ours, theirs):
        drawn.arguments["slots"][2] = -1

    load("selective_scan").selective_scan(**ours.arguments, **snapshots)
    plain(theirs, **snapshots)

    for name in ("out", "states"):
        close(ours.arguments[name], theirs.arguments[name].cpu().double())


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100])
def test_in_plain_torch_a_prompt_that_is_cut_has_the_same_bits(cut):
    whole, first, second = (batch([130], dim=16, numbers=16, seed=3) for _ in range(3))
    for part, span in ((first, slice(cut)), (second, slice(cut, None))):
        for name in ("x", "dt", "gate", "b", "c", "out"):
            part.arguments[name] = part.arguments[name][span].clone()
        part.arguments["starts"] = torch.tensor([0, len(part.arguments["x"])])
    second.arguments["states"] = first.arguments["states"]
    second.arguments["has_initial"] = torch.tensor([True])

    want = plain(whole)
    got = torch.cat([plain(first), plain(second)])

    assert torch.equal(got, want)
    assert torch.equal(first.arguments["states"], whole.arguments["states"])


def test_in_plain_torch_a_prompt_has_the_same_bits_alone_and_beside_others():
    drawn = batch([70, 1, 33, 130], dim=16, numbers=16)
    alone = []
    for index, (begin, end) in enumerate(zip(drawn.begins, drawn.begins[1:], strict=False)):
        one = dict(drawn.arguments)
        for name in ("x", "dt", "gate", "b", "c", "out"):
            one[name] = one[name][begin:end].clone()
        for name in ("slots", "has_initial"):
            one[name] = one[name][index : index + 1]
        one |= {"starts": torch.tensor([0, end - begin]), "states": one["states"].clone()}
        alone.append(plain(Batch(one, [0, end - begin])))

    assert torch.equal(plain(drawn), torch.cat(alone))


def test_in_plain_torch_a_token_has_the_bits_of_a_decode():
    """So it does not matter whether a token of a cached prefix was generated or was in a prompt."""
    from sglang_jenga.cpu.mamba import selective_state_update

    drawn = batch([1, 1, 1], dim=16, numbers=16)
    x, dt, gate, a, b, c, d, states, slots = drawn.of("x dt gate a b c d states slots")
    states[slots[~drawn.arguments["has_initial"]]] = 0
    states = states[:, :, None, :].clone()
    want = torch.empty(3, 16, 1)
    selective_state_update(
        states,
        x[..., None],
        dt[..., None],
        a[:, None],
        b[:, None],
        c[:, None],
        d[:, None],
        z=gate[..., None],
        dt_softplus=True,
        state_batch_indices=slots,
        out=want,
    )

    got = plain(drawn)

    assert torch.equal(got, want[..., 0])
    assert torch.equal(drawn.arguments["states"][slots], states[slots, :, 0])


BAD = {
    "x": (lambda t: t.t().contiguous().t(), "x: expected a last stride of 1"),
    "b": (lambda t: t[:, :3], "b: expected float32"),
    "a": (lambda t: t.double(), "a: expected float32"),
    "slots": (lambda t: t + 100, "slots: expected ids in"),
    "starts": (lambda t: t + 1, "starts: expected ids in"),
    "has_initial": (lambda t: t.int(), "has_initial: expected bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    from sglang_jenga.kernels.selective_scan import selective_scan

    spoil, message = BAD[name]
    arguments = batch([3, 4]).arguments
    arguments[name] = spoil(arguments[name])

    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)


def test_ends_of_snapshots_come_with_slots():
    from sglang_jenga.kernels.selective_scan import selective_scan

    with pytest.raises(ValueError, match="both their ends and their slots"):
        selective_scan(**batch([3]).arguments, snapshot_ends=torch.tensor([2]))
