"""Requests as SGLang's tokenizer process sends them to its scheduler: greedy, and as a whole."""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams


def message(
    rid: str, input_ids: array[int], sampling: dict[str, Any], **more: Any
) -> TokenizedGenerateReqInput:
    """``sampling``: parameters beside the temperature; ``more``: fields of the message."""
    params = SamplingParams(temperature=0, **sampling)
    params.normalize(None)
    fields: dict[str, Any] = {
        "input_text": None,
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
    }
    return TokenizedGenerateReqInput(
        rid=rid, input_ids=input_ids, sampling_params=params, **(fields | more)
    )
