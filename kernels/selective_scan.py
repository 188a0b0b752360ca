"""The recurrence of Mamba-1 over packed prompts, with states in slots of a strided pool.

For a token of a sequence, per channel d with its state S[d, :] of N numbers,

    S <- exp(dt A) S + dt x B^T;   y = (S C + D x) silu(gate)

where dt is softplus of what the model projects. One launch serves every sequence of a batch. A
program holds the state of some channels in registers and walks over the tokens of one sequence.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from sglang_jenga.kernels.launch import (
    INDEX,
    can_launch,
    check_range,
    check_tensor,
    device_of,
)

BLOCK_DIM = 32  # channels per program
REFERENCE_NUMBERS = 1 << 20  # of states, that plain torch has in hand at a time, if not one token's
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SOFTPLUS_IS_IDENTITY_ABOVE = 20.0


@triton.jit
def _softplus(value):
    """log(1 + e^x) with log1p's accuracy, which Triton's interpreter lacks: what 1 + e^x rounds off
    is put back."""
    e = tl.exp(tl.minimum(value, 20.0))
    rounded = 1.0 + e
    lost = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / lost))
    return tl.where(value > 20.0, value, log1p)


@triton.jit
def _walk(
    state,
    begin,
    end,
    x,
    dt,
    gate,
    b,
    c,
    out,
    decay,
    skip,
    channel,
    number,
    live,
    inside,
    x_token,
    dt_token,
    gate_token,
    b_token,
    c_token,
    out_token,
):
    """The tokens ``[begin, end)`` of the batch, for one program's channels."""
    first = begin.to(tl.int64)
    for index in range(0, end - begin):
        token = first + index
        now = tl.load(x + token * x_token + channel, mask=live, other=0.0).to(tl.float32)
        step = tl.load(dt + token * dt_token + channel, mask=live, other=0.0).to(tl.float32)
        opening = tl.load(gate + token * gate_token + channel, mask=live, other=0.0).to(tl.float32)
        write = tl.load(b + token * b_token + number, mask=inside, other=0.0).to(tl.float32)
        read = tl.load(c + token * c_token + number, mask=inside, other=0.0).to(tl.float32)
        step = _softplus(step)
        state = tl.exp(step[:, None] * decay) * state + (step * now)[:, None] * write[None, :]
        y = tl.sum(state * read[None, :], axis=1) + skip * now
        y = y * (opening / (1.0 + tl.exp(-opening)))
        tl.store(out + token * out_token + channel, y.to(out.dtype.element_ty), mask=live)
    return state


@triton.jit
def _scan_kernel(
    x,
    dt,
    gate,
    b,
    c,
    a,
    d,
    out,
    states,
    slots,
    starts,
    has_initial,
    snapshot_ends,
    snapshot_slots,
    dim,
    x_token,
    dt_token,
    gate_token,
    b_token,
    c_token,
    out_token,
    a_channel,
    state_slot,
    state_channel,
    state_number,
    STATE: tl.constexpr,
    HAS_SNAPSHOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    sequence = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = tl.arange(0, BLOCK_STATE)
    live, inside = channel < dim, number < STATE
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    slot = tl.load(slots + sequence).to(tl.int64)
    cell = live[:, None] & inside[None, :]
    place = channel[:, None] * state_channel + number[None, :].to(tl.int64) * state_number
    # A sequence without a slot keeps no state, and one without tokens has nothing to say of it.
    kept = cell & (slot >= 0) & (end > begin)
    initial = kept & (tl.load(has_initial + sequence) != 0)
    state = tl.load(states + slot * state_slot + place, mask=initial, other=0.0).to(tl.float32)
    decay = tl.load(a + channel[:, None] * a_channel + number[None, :], mask=cell, other=0.0)
    skip = tl.load(d + channel, mask=live, other=0.0).to(tl.float32)
    middle = begin
    if HAS_SNAPSHOTS:
        middle = tl.minimum(tl.maximum(tl.load(snapshot_ends + sequence), begin), end)
        state = _walk(
            state, begin, middle, x, dt, gate, b, c, out, decay, skip, channel, number, live,
            inside, x_token, dt_token, gate_token, b_token, c_token, out_token,
        )  # fmt: skip
        target = tl.load(snapshot_slots + sequence).to(tl.int64)
        wanted = cell & (middle > begin) & (target >= 0)
        pool = states + target * state_slot + place
        tl.store(pool, state.to(states.dtype.element_ty), mask=wanted)
    state = _walk(
        state, middle, end, x, dt, gate, b, c, out, decay, skip, channel, number, live,
        inside, x_token, dt_token, gate_token, b_token, c_token, out_token,
    )  # fmt: skip
    tl.store(states + slot * state_slot + place, state.to(states.dtype.element_ty), mask=kept)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    gate: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    has_initial: torch.Tensor,
    out: torch.Tensor,
    snapshot_ends: torch.Tensor | None = None,
    snapshot_slots: torch.Tensor | None = None,
) -> None:
    """Run the recurrence over packed sequences; write ``out`` and the sequences' last states.

    Sequence i is tokens ``[starts[i], starts[i + 1])``. It begins from ``states[slots[i]]`` where
    ``has_initial[i]``, else from zero, and leaves its last state there. A negative slot is padding:
    nothing is kept. With snapshots, sequence i also leaves the state that it has before token
    ``snapshot_ends[i]`` of the batch in ``states[snapshot_slots[i]]``, unless that end does not lie
    behind its begin or the slot is negative. No two sequences may write one slot.

    Args:
        x, dt, gate, out: shape [tokens, dim], last stride 1; ``dt`` before softplus. The states'
            arithmetic is float32 whatever these are.
        a: shape [dim, N], float32, last stride 1: negative, one decay per number of the state.
        b, c: shape [tokens, N], last stride 1.
        d: shape [dim].
        states: shape [num_slots, dim, N], any strides.
        slots, starts, snapshot_ends, snapshot_slots: int32 or int64, shape [sequences],
            [sequences + 1] for ``starts``.
        has_initial: shape [sequences], bool.

    Raises:
        ValueError: a wrong shape, dtype, stride or device; in host memory also an id outside its
            range.
    """
    tokens, dim = x.shape
    numbers, sequences = a.shape[-1], slots.numel()
    for name, tensor in (("x", x), ("dt", dt), ("gate", gate), ("out", out)):
        check_tensor(name, tensor, FLOATS, (tokens, dim), x.device)
    for name, tensor in (("b", b), ("c", c)):
        check_tensor(name, tensor, FLOATS, (tokens, numbers), x.device)
    check_tensor("a", a, (torch.float32,), (dim, numbers), x.device)
    check_tensor("d", d, FLOATS, (dim,), x.device)
    check_tensor("states", states, FLOATS, (None, dim, numbers), x.device)
    check_tensor("slots", slots, INDEX, (sequences,), x.device)
    check_tensor("starts", starts, INDEX, (sequences + 1,), x.device)
    check_tensor("has_initial", has_initial, (torch.bool,), (sequences,), x.device)
    if (snapshot_ends is None) != (snapshot_slots is None):
        raise ValueError("snapshots: expected both their ends and their slots, got one of them")
    for name, tensor in (("snapshot_ends", snapshot_ends), ("snapshot_slots", snapshot_slots)):
        if tensor is not None:
            check_tensor(name, tensor, INDEX, (sequences,), x.device)
    flat = {"x": x, "dt": dt, "gate": gate, "out": out, "a": a, "b": b, "c": c, "d": d}
    for name, tensor in flat.items():
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: expected a last stride of 1, got {tensor.stride(-1)}")
    check_range("starts", starts, tokens + 1)
    for name, tensor in (("slots", slots), ("snapshot_slots", snapshot_slots)):
        if tensor is not None and tensor.is_cpu:
            check_range(name, tensor[tensor >= 0], states.shape[0])
    if not sequences or not dim:
        return
    if not can_launch(_scan_kernel, x):
        selective_scan_reference(
            x, dt, gate, a, b, c, d, states, slots, starts, has_initial, out,
            snapshot_ends, snapshot_slots,
        )  # fmt: skip
        return
    block = min(BLOCK_DIM, triton.next_power_of_2(dim))
    with device_of(x):
        _scan_kernel[(sequences, triton.cdiv(dim, block))](
            x,
            dt,
            gate,
            b,
            c,
            a,
            d,
            out,
            states,
            slots.contiguous(),
            starts.contiguous(),
            has_initial.contiguous().view(torch.uint8),
            slots if snapshot_ends is None else snapshot_ends.contiguous(),
            slots if snapshot_slots is None else snapshot_slots.contiguous(),
            dim,
            x.stride(0),
            dt.stride(0),
            gate.stride(0),
            b.stride(0),
            c.stride(0),
            out.stride(0),
            a.stride(0),
            *states.stride(),
            STATE=numbers,
            HAS_SNAPSHOTS=snapshot_ends is not None,
            BLOCK=block,
            BLOCK_STATE=triton.next_power_of_2(numbers),
            num_warps=1,
        )


def selective_scan_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    gate: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    has_initial: torch.Tensor,
    out: torch.Tensor,
    snapshot_ends: torch.Tensor | None = None,
    snapshot_slots: torch.Tensor | None = None,
) -> None:
    """``selective_scan`` in plain torch: all sequences side by side, a block of tokens at a time.

    Only the sum of what a state keeps and what it takes in goes token by token. So every number is
    the result of the same operations in the same order however a prompt was cut or batched, and of
    those that a decode step makes.
    """
    edges = starts.tolist()
    longest_first = sorted(
        (i for i in range(len(edges) - 1) if edges[i] < edges[i + 1]),
        key=lambda i: edges[i] - edges[i + 1],
    )
    if not longest_first:
        return
    order = torch.tensor(longest_first, device=x.device)
    begins, lengths = starts[order].long(), (starts[order + 1] - starts[order]).long()
    homes = slots[order].long()
    kept = homes >= 0
    initial = has_initial[order] & kept
    state = states.new_zeros((len(order), *a.shape), dtype=torch.float32)
    state[initial] = states[homes[initial]].float()
    skip, position, longest = d.float(), 0, int(lengths[0])
    # Memory that is asked for once: fresh pages would cost more than the arithmetic.
    scratch = state.new_empty(2, max(REFERENCE_NUMBERS, state.numel()))
    while position < longest:
        live = int((lengths > position).sum())
        block = max(1, min(64, REFERENCE_NUMBERS // (live * a.numel()), longest - position))
        at = position + torch.arange(block, device=x.device)[:, None]
        inside = at < lengths[:live]
        tokens = (begins[:live] + at).clamp(max=x.shape[0] - 1)  # [block, live]
        now = x[tokens].float()
        # A step of no length leaves the state as it is: what lies behind a sequence's end.
        step = torch.where(inside[..., None], _softplus_of(dt[tokens].float()), 0.0)
        shape = (block, live, *a.shape)
        history, take = (part[: prod(shape)].view(shape) for part in scratch)
        torch.mul(step[..., None], a, out=history).exp_()
        torch.mul((step * now)[..., None], b[tokens].float()[:, :, None, :], out=take)
        before = state[:live]
        for decay, taken in zip(history, take, strict=True):
            before = decay.mul_(before).add_(taken)
        state[:live] = before
        y = torch.mul(history, c[tokens].float()[:, :, None, :], out=take).sum(-1) + skip * now
        opening = gate[tokens].float()
        y = y * (opening / (1 + torch.exp(-opening)))
        out[tokens[inside]] = y[inside].to(out.dtype)
        if snapshot_ends is not None and snapshot_slots is not None:
            reach = torch.minimum(snapshot_ends[order].long() - begins, lengths)[:live]
            offset, targets = reach - 1 - position, snapshot_slots[order].long()[:live]
            row = ((offset >= 0) & (offset < block) & (targets >= 0)).nonzero()[:, 0]
            states[targets[row]] = history[offset[row], row].to(states.dtype)
        position += block
    states[homes[kept]] = state[kept].to(states.dtype)


def _softplus_of(x: torch.Tensor) -> torch.Tensor:
    """softplus whose bits do not depend on where in a tensor an element stands, as torch's do."""
    return torch.where(x > _SOFTPLUS_IS_IDENTITY_ABOVE, x, torch.log1p(torch.exp(x)))
