"""Models that --memory-backend jenga refuses, and which attention backends serve the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_jenga.boot import known_model
from sglang_jenga.layers import registry
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.cross import Cross
from sglang_jenga.plan import catalogue, layer_rules, true_windows
from sglang_jenga.plan.hf_config import ranks_refusal
from sglang_jenga.plan.model_row import WINDOWS_BESIDE_STATES

ATTENTION_BACKENDS = ("torch_native", "triton", "flashinfer", "fa3", "fa4", "trtllm_mha")
# Of these, the ones whose kernels take V rows narrower than K rows.
ASYMMETRIC_BACKENDS = ("triton", "fa3", "fa4")
# The one whose prefills, on cards before Blackwell and on small Blackwells, read K and V only where
# they are two halves of one buffer, and else copy the batch's pages, or the pool, in every layer.
COPYING_BACKEND = "trtllm_mha"


class ModelRule(NamedTuple):
    """A kind of model that is refused, asked of SGLang's ``ModelConfig``."""

    applies: Callable[[Any], bool]
    why: str


MODEL_RULES = (
    ModelRule(lambda model: _has_extra_cache(model), layer_rules.EXTRA_CACHE),
    ModelRule(lambda model: _is_mla(model), layer_rules.MLA),
    ModelRule(lambda model: _has_unknown_encoder(model), layer_rules.CROSS),
    ModelRule(lambda model: _has_windows_beside_states(model), WINDOWS_BESIDE_STATES),
    ModelRule(lambda model: _has_unknown_states(model), layer_rules.UNTRIED_STATES),
)
"""What SGLang says of models that the table of models does not name."""


def refused_lines(model: Any) -> list[str]:
    """At most one line: a model with a reason is refused, other reasons follow from it."""
    known = known_model.of_model(model)
    try:
        reasons = [known.row.why_refused(known.read)]
    except ValueError as error:  # a config that the table cannot read
        reasons = [str(error)]
    if not known.listed and not _has_code(model):
        reasons.append(layer_rules.NO_CODE)
    reasons += [rule.why for rule in MODEL_RULES if rule.applies(model)]
    return [layer_rules.refusal(known.architecture, why) for why in reasons if why][:1]


def _has_code(model: Any) -> bool:
    """Whether SGLang has code for a model, or Transformers has some that its fallback takes. SGLang
    itself would say so once its processes have started."""
    from sglang.srt.configs.model_config import ModelImpl

    architectures = model.hf_config.architectures or []
    if model.model_impl != ModelImpl.AUTO or catalogue.has_code(architectures):
        return True
    from sglang.srt.model_loader.utils import resolve_transformers_arch
    from sglang.srt.models.registry import ModelRegistry  # imports the code of every model

    brought = "AutoModel" in (getattr(model.hf_config, "auto_map", None) or {})
    if brought or any(ModelRegistry.is_arch_supported(name) for name in architectures):
        return True
    try:
        resolve_transformers_arch(model, architectures)
    except ValueError:
        return False
    return True


def true_windows_lines(model: Any, *, stored_in_full: bool = False) -> list[str]:
    """A line if --jenga-true-windows means nothing for this model, or nothing would be gained."""
    if stored_in_full:
        why = "the windows would be kept to and stored in full"
        return [
            layer_rules.flag_refusal("--disable-hybrid-swa-memory", why, beside=true_windows.FLAG)
        ]
    known = known_model.of_model(model)
    line = true_windows.refusal(known.architecture, layer_rules.MODELS, known.read)
    return [line] if line else []


def ranks_lines(model: Any, tp: int) -> list[str]:
    """A line if SGLang's layers cannot be shared by so many ranks. It asserts that, with a trace,
    once the model is built; its CPU engine pads heads instead."""
    known = known_model.of_model(model)
    line = ranks_refusal(known.architecture, known.row, known.read, tp)
    return [line] if line else []


def backend_lines(
    prefill: str | None, decode: str | None, model: Any, *, blackwell: bool
) -> list[str]:
    """One line per attention backend that cannot serve this model from the pool."""
    served, why = _backends_of(model)
    mixed = model.is_hybrid_swa or has_state(model)
    if COPYING_BACKEND in (prefill, decode) and COPYING_BACKEND in served and mixed:
        # Whole tiles at the edge of a window, as its decodes load, are not known to be harmless.
        edges = model.is_hybrid_swa and has_state(model)
        if edges or not blackwell:
            served = tuple(name for name in served if name != COPYING_BACKEND)
            why = _TILES if blackwell else _COPIES
    backends = {"": decode} if prefill == decode else {"prefill-": prefill, "decode-": decode}
    return [
        f"--memory-backend jenga does not work with --{phase}attention-backend {name}: {why}; "
        f"use one of {', '.join(served)} or drop --memory-backend"
        for phase, name in backends.items()
        if name not in served
    ]


_COPIES = (
    "before Blackwell its prefills copy K and V in every layer where layers of several types share "
    "the pool"
)
_TILES = "its kernels load more than the window, and states may lie there"


def page_lines(page_size: int | None, model: Any) -> list[str]:
    """A line for a page size that a model with an encoder is not served with."""
    if not model.is_encoder_decoder or page_size in (None, 1):
        return []
    return [layer_rules.flag_refusal("--page-size", layer_rules.ENCODER_PAGES, value=page_size)]


def transfer_lines(model: Any) -> list[str]:
    """A line for a model that no prefill server can send to a decode server."""
    if not model.is_encoder_decoder:
        return []
    why = "SGLang sends the tokens of a row, and those of an encoder lie in other pages"
    return [layer_rules.flag_refusal("--disaggregation-mode", why)]


def _backends_of(model: Any) -> tuple[tuple[str, ...], str]:
    if model.is_encoder_decoder:
        return Cross.backends, "its kernels have no cross attention"
    if model.is_hybrid_swa:
        kind = registry.kind_named(known_model.of_model(model).row.sliding)
        if model.attention_chunk_size is not None:
            kind = Chunked  # so are its layers built, though their group may be a window as wide
        if kind.backends:
            return kind.backends, f"its kernels read more than a {kind.name} layer keeps"
    served = ASYMMETRIC_BACKENDS if model.has_asymmetric_kv else ATTENTION_BACKENDS
    return served, "its kernels are not known to read strided KV"


def has_state(model: Any) -> bool:
    """Whether the model has recurrent states, with attention layers or without."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.SSM or mambaish_config(model) is not None


def _is_mla(model: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA


def _has_windows_beside_states(model: Any) -> bool:
    windows_only = model.is_hybrid_swa and not model.full_attention_layer_ids
    return windows_only and has_state(model)


def _has_unknown_states(model: Any) -> bool:
    return has_state(model) and known_model.of_model(model).row.state is None


def _has_unknown_encoder(model: Any) -> bool:
    return model.is_encoder_decoder and not known_model.of_model(model).listed


def _has_extra_cache(model: Any) -> bool:
    from sglang.srt.configs import model_config as known

    kinds = (
        known.is_deepseek_dsa,
        known.is_deepseek_v4,
        known.is_minimax_sparse,
        known.is_qwen4_exp,
    )
    return any(is_kind(model.hf_config) for is_kind in kinds)
