"""Bytes of one element of K and V, as SGLang settles them from a flag and a checkpoint.

``--kv-cache-dtype auto`` is the format the model runs in, unless the checkpoint was quantised by
ModelOpt with FP8 KV (mem_cache/kv_cache_dtype.py, layers/quantization/modelopt_quant.py). Stdlib
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3")
"""Values of ``--kv-cache-dtype`` that the server takes."""
MODEL_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
"""Values of ``--dtype``."""

_ITEMSIZE = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_FP8 = ("fp8_e5m2", "fp8_e4m3")


def kv_itemsize(
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    *,
    kv_cache_dtype: str = "auto",
    dtype: str = "auto",
    quantisation: Mapping[str, Any] | None = None,
) -> int:
    """Return bytes per element of KV.

    Args:
        config: the whole config.json; ``section`` its part about the language model.
        quantisation: the checkpoint's hf_quant_config.json, if it has one.

    Raises:
        ValueError: a dtype that SGLang or this project does not take.
    """
    for value, known, flag in (
        (kv_cache_dtype, KV_CACHE_DTYPES, "--kv-cache-dtype"),
        (dtype, MODEL_DTYPES, "--dtype"),
    ):
        if value not in known:
            raise ValueError(f"{flag} must be one of {', '.join(known)}, got {value!r}")
    if kv_cache_dtype != "auto":
        return 1 if kv_cache_dtype in _FP8 else 2
    if stores_fp8(config, quantisation):
        return 1
    if dtype != "auto":
        return _ITEMSIZE[dtype]
    stored = next(
        (
            part[key]
            for part in (section, config)
            for key in ("dtype", "torch_dtype")
            if part.get(key)
        ),
        "float32",
    )
    # SGLang runs float32 checkpoints, and those that do not say, in 16 bits.
    return 2 if stored == "float32" else _ITEMSIZE.get(stored, 2)


def stores_fp8(config: Mapping[str, Any], quantisation: Mapping[str, Any] | None) -> bool:
    """Whether the checkpoint itself asks for FP8 KV."""
    quant = config.get("quantization_config") or config.get("compression_config") or quantisation
    if not quant:
        return False
    flat = quant if quant.get("quant_algo") is not None else quant.get("quantization") or {}
    if str(quant.get("quant_method", "modelopt")).startswith("modelopt") and flat.get("quant_algo"):
        return _scheme(flat) == "FP8"
    # SGLang's FP8 checkpoints may name it as well.
    return quant.get("quant_method") in ("fp8", "mxfp8") and (
        str(quant.get("kv_cache_quant_algo")).upper() == "FP8"
    )


def _scheme(quant: Mapping[str, Any]) -> str:
    scheme = quant.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        is_fp8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
        return "FP8" if is_fp8 else "auto"
    if isinstance(scheme, str):
        return "FP8" if scheme.strip().upper() in ("FP8", "FLOAT8") else "auto"
    return str(quant.get("kv_cache_quant_algo")).upper()
