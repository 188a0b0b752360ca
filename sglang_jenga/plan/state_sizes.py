"""Bytes of one request's recurrent state in one layer, on one of `tp` ranks.

As SGLang's config classes give them (``mamba2_cache_params``, configs/mamba_utils.py): the last
``kernel - 1`` inputs of a convolution, and the state itself. Fields are read as in `layer_lists`.
Stdlib only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sglang_jenga.layers.base import Address
from sglang_jenga.plan.layer_lists import Read, need
from sglang_jenga.plan.spec import LayerGroup

StateRule = Callable[[Read, int], int]

CONV_ITEMSIZE = 2  # SGLANG_MAMBA_CONV_DTYPE: bfloat16 unless set
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


SLOT_BYTES = 64
"""What a token's slot costs where no layer stores anything for it. A request of 8,192 tokens then
takes 0.5 MiB beside a state of tens, and 32-bit slot numbers reach over 128 GiB."""


SLOTS_PER_ENTRY = 64
"""Slots that take as much as one token's windows, in a model of windows alone. The map from slots
to windows lies beside the pool, 8 bytes a slot: at 64 bytes each it would take an eighth of the
pool's bytes, at 2,304 (36 layers of 4 KiB) a third of a percent."""


class UnevenRanksError(ValueError):
    """A number of ranks that heads or channels cannot be shared by."""


def gated_delta_rule(read: Read, tp: int) -> int:
    """Qwen3-Next, Qwen3.5: the state of a value head is keys x values."""
    return _mamba_2(
        tp,
        heads=need(read, "linear_num_value_heads"),
        head_dim=need(read, "linear_value_head_dim"),
        num_groups=need(read, "linear_num_key_heads"),
        state=need(read, "linear_key_head_dim"),
        kernel=read("linear_conv_kernel_dim") or 4,
        itemsize=_state_itemsize(read),
    )


def jet(read: Read, tp: int) -> int:
    """Jet-Nemotron: a gated delta rule described in a nested section of the config."""
    section = need(read, "efficient_attention_config").get("jet")
    missing = {"num_heads", "head_dim", "expand_v", "conv_size"} - set(section or ())
    if missing:
        raise ValueError(f"efficient_attention_config.jet lacks {', '.join(sorted(missing))}")
    return _mamba_2(
        tp,
        heads=section["num_heads"],
        head_dim=int(section["head_dim"] * section["expand_v"]),
        num_groups=section["num_heads"],
        state=section["head_dim"],
        kernel=section["conv_size"],
        itemsize=_state_itemsize(read),
    )


def nemotron_h(read: Read, tp: int) -> int:
    return _mamba_2(
        tp,
        heads=need(read, "mamba_num_heads"),
        head_dim=need(read, "mamba_head_dim"),
        num_groups=read("n_groups") or 8,
        state=read("ssm_state_size") or 128,
        kernel=read("conv_kernel") or 4,
        itemsize=_state_itemsize(read),
    )


def falcon_h1(read: Read, tp: int) -> int:
    inner = read("mamba_d_ssm") or (read("mamba_expand") or 2) * need(read, "hidden_size")
    return _of_inner(read, tp, inner, _state_itemsize(read))


def granite(read: Read, tp: int) -> int:
    inner = (read("mamba_expand") or 2) * need(read, "hidden_size")
    return _of_inner(read, tp, inner, _ITEMSIZE["float32"])


def mamba_2(read: Read, tp: int) -> int:
    heads, head_dim = need(read, "num_heads"), need(read, "head_dim")
    return _mamba_2(
        tp,
        heads=heads,
        head_dim=head_dim,
        num_groups=read("n_groups") or 8,
        state=read("state_size") or 128,
        kernel=read("conv_kernel") or 4,
        itemsize=_ITEMSIZE["float32"],
    )


def mamba_1(read: Read, tp: int) -> int:
    """The convolution runs over the inner channels alone, the state is full rank."""
    inner = read("intermediate_size")
    if inner is None:
        inner = (read("expand") or 2) * need(read, "hidden_size")
    elif type(inner) is not int or inner <= 0:
        raise ValueError(f"intermediate_size must be a whole number above 0, got {inner!r}")
    return _full_rank(tp, inner, read("state_size") or 16, read("conv_kernel") or 4)


def jamba(read: Read, tp: int) -> int:
    inner = (read("mamba_expand") or 2) * need(read, "hidden_size")
    return _full_rank(tp, inner, read("mamba_d_state") or 16, read("mamba_d_conv") or 4)


def short_convolution(read: Read, tp: int) -> int:
    """LFM2: the convolution's inputs are all there is."""
    channels = _share("channels", need(read, "hidden_size"), tp)
    return channels * ((read("conv_L_cache") or 3) - 1) * CONV_ITEMSIZE


def slot_beside(windows: int) -> int:
    """Bytes of a slot beside so many of a token's windows, in a model without full attention."""
    return max(SLOT_BYTES, windows // SLOTS_PER_ENTRY // SLOT_BYTES * SLOT_BYTES)


def with_slots(groups: Sequence[LayerGroup], pool_bytes: int) -> tuple[LayerGroup, ...]:
    """The groups of a pool of so many bytes: where no layer of the full group stores anything, a
    slot costs as much as keeps its number within 32 bits, and beside windows a share of theirs."""
    first, *others = groups
    if not first.num_layers:
        windows = sum(item.entry_bytes for item in others if item.kind.address is Address.MAPPED)
        slot_bytes = max(slot_beside(windows), 1 << (pool_bytes >> 31).bit_length())
        first = replace(first, entry_bytes=slot_bytes)
    return (first, *others)


def _of_inner(read: Read, tp: int, inner: int, itemsize: int) -> int:
    heads, head_dim = need(read, "mamba_n_heads"), read("mamba_d_head")
    if inner % heads or head_dim not in (None, "auto", inner // heads):
        raise ValueError(
            f"mamba_n_heads={heads} heads of mamba_d_head={head_dim} do not make up the {inner} "
            "channels of the state layers"
        )
    return _mamba_2(
        tp,
        heads=heads,
        head_dim=inner // heads,
        num_groups=read("mamba_n_groups") or 1,
        state=need(read, "mamba_d_state"),
        kernel=read("mamba_d_conv") or 4,
        itemsize=itemsize,
    )


def _mamba_2(
    tp: int, *, heads: int, head_dim: int, num_groups: int, state: int, kernel: int, itemsize: int
) -> int:
    if num_groups % tp:
        num_groups += tp - num_groups  # SGLang repeats groups so that every rank has its own
    conv_dim = _share("channels", heads * head_dim + 2 * num_groups * state, tp)
    ssm = _share("heads", heads, tp) * head_dim * state
    return conv_dim * (kernel - 1) * CONV_ITEMSIZE + ssm * itemsize


def _full_rank(tp: int, inner: int, state: int, kernel: int) -> int:
    channels = _share("channels", inner, tp)
    return channels * (kernel - 1) * CONV_ITEMSIZE + channels * state * _ITEMSIZE["float32"]


def _state_itemsize(read: Read) -> int:
    return _ITEMSIZE.get(read("mamba_ssm_dtype") or "float32", 4)


def _share(of_what: str, value: int, tp: int) -> int:
    if value % tp:
        raise UnevenRanksError(f"{tp} ranks cannot share its {value} state {of_what}")
    return value // tp
