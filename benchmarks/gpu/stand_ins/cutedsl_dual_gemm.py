"""Two projections and their activation in one kernel: Blackwell's, and not here."""

from enum import IntEnum

MAX_DUAL_GEMM_DECODE_TOKENS = 0
DualGemmQuantMode = IntEnum(
    "DualGemmQuantMode", {"STATIC_PER_TENSOR": 0, "DYNAMIC_PER_TOKEN": 3, "UNQUANT": 4}
)


def can_use_dual_gemm(*_: object) -> bool:
    return False
