"""What stock SGLang 0.5.23 holds in the same bytes, with its default ratios.

Restates its sizing arithmetic (pool_configurator.py, kv_cache_configurator.py) for one rank without
speculative decoding, prefix sharing or a user's token cap. Three shapes of pool: every layer stored
for every token, full and window pools in a fixed token ratio, and states beside KV in a fixed byte
ratio. Stdlib only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SWA_FULL_TOKENS_RATIO = 0.8
MAMBA_FULL_MEMORY_RATIO = 0.9


@dataclass(frozen=True, slots=True)
class StockLayout:
    """How stock SGLang stores a model.

    ``token_bytes`` is one token's KV over the layers of the full pool, ``window_token_bytes`` over
    those of the window pool (0 = there is none), ``state_bytes`` one state slot over all its
    layers (0 = none). ``window`` is the window pool's, the current token included.
    ``states_per_request`` is SGLang's divisor: running requests <= state slots // that.
    """

    token_bytes: int
    window_token_bytes: int = 0
    window: int | None = None
    state_bytes: int = 0
    states_per_request: int = 0
    page_size: int = 1
    summary: str = "every layer stored for every token"

    def __post_init__(self) -> None:
        if self.token_bytes < 0 or self.page_size <= 0:
            raise ValueError(
                f"token_bytes must be >= 0 and page_size positive, got {self.token_bytes} and "
                f"{self.page_size}"
            )
        if (self.window is None) != (self.window_token_bytes == 0):
            raise ValueError(
                f"window and window_token_bytes go together, got {self.window} and "
                f"{self.window_token_bytes}"
            )
        if (self.states_per_request == 0) != (self.state_bytes == 0):
            raise ValueError(
                f"state_bytes and states_per_request go together, got {self.state_bytes} and "
                f"{self.states_per_request}"
            )


class StockPool(NamedTuple):
    """Capacities of the pools stock SGLang builds: tokens, tokens, state slots."""

    full_tokens: int
    window_tokens: int
    states: int


def stock_pool(layout: StockLayout, pool_bytes: int) -> StockPool:
    """Size the pools as stock SGLang does from the bytes left for caches.

    Each KV buffer has `page_size` more slots, a padding sink, on top of these bytes.
    """
    states = 0
    if layout.state_bytes:
        # _handle_max_mamba_cache: the pool's padding slot comes out of the same budget.
        budget = pool_bytes * MAMBA_FULL_MEMORY_RATIO / (1 + MAMBA_FULL_MEMORY_RATIO)
        states = max(0, int((budget - layout.state_bytes) // layout.state_bytes))
        pool_bytes = max(0, pool_bytes - (states + 1) * layout.state_bytes)
    if not (layout.token_bytes or layout.window_token_bytes):
        return StockPool(0, 0, states)
    if not layout.window_token_bytes:
        return StockPool(_floor(pool_bytes // layout.token_bytes, layout.page_size), 0, states)
    if not layout.token_bytes:
        tokens = _floor(pool_bytes // layout.window_token_bytes, layout.page_size)
        return StockPool(0, tokens, states)
    # HybridSWAPoolConfigurator: one token of the full pool pays for 0.8 tokens of the other.
    cell_bytes = layout.token_bytes + SWA_FULL_TOKENS_RATIO * layout.window_token_bytes
    full_tokens = _floor(int(pool_bytes // cell_bytes), layout.page_size)
    window_tokens = _floor(int(full_tokens * SWA_FULL_TOKENS_RATIO), layout.page_size)
    return StockPool(full_tokens, window_tokens, states)


def stock_requests(layout: StockLayout, pool_bytes: int, num_tokens: int) -> int:
    """Count the concurrent running requests of `num_tokens` tokens each that stock SGLang holds.

    The padding sink of each KV buffer is charged here, so that `pool_bytes` is all that is used.
    """
    if num_tokens <= 0:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}")
    page_size = layout.page_size
    sink_bytes = page_size * (layout.token_bytes + layout.window_token_bytes)
    pool = stock_pool(layout, max(0, pool_bytes - sink_bytes))
    request_tokens = _ceil(num_tokens, page_size)
    held = []
    if layout.token_bytes:
        held.append(pool.full_tokens // request_tokens)
    if layout.window is not None:
        # validate_swa_pool_size: a window pool this small stops the server at boot.
        if layout.window - 1 + page_size >= pool.window_tokens:
            return 0
        kept = _ceil(max(layout.window - 1, page_size), page_size) + page_size
        held.append(pool.window_tokens // min(request_tokens, kept))
    if layout.state_bytes:
        held.append(pool.states // layout.states_per_request)
    return min(held)


def stock_tokens(layout: StockLayout, pool_bytes: int, num_tokens: int) -> int:
    """Count the tokens in context when stock SGLang is full of such requests."""
    return num_tokens * stock_requests(layout, pool_bytes, num_tokens)


def _floor(value: int, step: int) -> int:
    return value // step * step


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step
