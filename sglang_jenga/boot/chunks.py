"""Decode steps inside the chunks of prompts: on where the user has no wish of their own.

SGLang's default takes prompts in steps of their own, of up to 8,192 tokens, and whoever is decoding
waits for them. Of one chunk's tokens, decode rows take one each (``--enable-mixed-chunk``), so that
nobody waits longer than a chunk of 2,048 takes. Both are SGLang's own options; a server whose user
gives either of them runs with what was given.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_jenga.boot import known_model, model_rules

CHUNK = 2048
"""Tokens of a step with a prompt in it, those of decode rows included."""

_logger = logging.getLogger(__name__)


def settle(server_args: Any, model: Any) -> None:
    """Before SGLang chooses a chunk from the GPU's memory, and what to reserve from the chunk."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = resolving_view(server_args)
    if _has_a_wish(config) or not (_mixes(config) and _is_mixable(model)):
        return
    _logger.info(
        "jenga: chunks of %d tokens with decode steps in them; --chunked-prefill-size takes prompts"
        " in steps of their own",
        CHUNK,
    )
    declare_resolution(
        server_args, "sglang-jenga", chunked_prefill_size=CHUNK, enable_mixed_chunk=True
    )


def _has_a_wish(config: Any) -> bool:
    return config.enable_mixed_chunk or config.chunked_prefill_size is not None


def _mixes(config: Any) -> bool:
    """Whether prompts and decode steps meet in this server's scheduler at all, one that all tokens
    of a batch go through, and answers may be rounded as their batches have it."""
    return (
        config.disaggregation_mode == "null"
        and config.pp_size == 1
        and config.attn_dp_size == 1
        and not config.enable_deterministic_inference
        and config.rl_on_policy_target is None
    )


def _is_mixable(model: Any) -> bool:
    """Dense models are served as they are without the flag. A batch with pictures in it has tokens
    that attend to later ones, or rows of an encoder, which decode rows do not."""
    if model.is_multimodal or model.is_encoder_decoder:
        return False
    known = known_model.of_model(model)
    layers = known.row.layers(known.read) if known.row.layers is not None else ()
    return model_rules.has_state(model) or any(places != ("full",) for places in layers)
