"""Jamba's config, with what SGLang asks of a model that has states."""

from __future__ import annotations

from typing import Any

from transformers import JambaConfig as TransformersJambaConfig


class JambaConfig(TransformersJambaConfig):
    """transformers finds tokenizers by the name of a config's class, so it keeps that name."""

    model_type = "jamba"

    @property
    def mamba_chunk_size(self) -> int:
        """A prompt's states are cached at multiples of so many tokens. The scan has no chunks and
        would leave one anywhere; this is SGLang's own number for models without a wish."""
        return 64

    @property
    def full_attention_layer_ids(self) -> list[int]:
        return self._layer_ids("attention")

    @property
    def mamba2_cache_params(self) -> Any:
        """The layout of a state on one rank: Mamba-1's on that of Mamba-2, as SGLang has it."""
        from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        shape = Mamba2StateShape.create_full_rank(
            tp_world_size=parallel.tp_size if parallel else 1,
            intermediate_size=self.mamba_expand * self.hidden_size,
            state_size=self.mamba_d_state,
            conv_kernel=self.mamba_d_conv,
        )
        return Mamba2CacheParams(shape=shape, layers=self._layer_ids("mamba"))

    def _layer_ids(self, block_type: str) -> list[int]:
        return [i for i, found in enumerate(self.layers_block_type) if found == block_type]
