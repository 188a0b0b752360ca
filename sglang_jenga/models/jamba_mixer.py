"""Jamba's Mamba-1 mixer: SGLang's, with learned norms, one scan per batch, and tracked states."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.mamba import mamba
from sglang.srt.layers.attention.mamba.mamba1 import MambaMixer1
from sglang.srt.layers.attention.mamba.mamba2_metadata import Mamba2Metadata
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch import Tensor

from sglang_jenga.kernels.selective_scan import selective_scan
from sglang_jenga.models.jamba_config import JambaConfig


class JambaMixer(MambaMixer1):
    """The parent projects, and decodes. Its prefill is a loop over tokens on the host and knows no
    tracking; ours is one kernel."""

    def __init__(
        self, config: JambaConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            intermediate_size=config.mamba_expand * config.hidden_size,
            state_size=config.mamba_d_state,
            conv_kernel=config.mamba_d_conv,
            time_step_rank=config.mamba_dt_rank,
            use_conv_bias=config.mamba_conv_bias,
            use_bias=config.mamba_proj_bias,
            activation=config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
        )
        eps = config.rms_norm_eps
        self.dt_layernorm = RMSNorm(config.mamba_dt_rank, eps=eps)
        self.b_layernorm = RMSNorm(config.mamba_d_state, eps=eps)
        self.c_layernorm = RMSNorm(config.mamba_d_state, eps=eps)

    def _ssm_params(self, conv_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dt`` before softplus ``[tokens, channels]``, ``B`` and ``C`` ``[tokens, state]``."""
        projected, _ = self.x_proj(conv_out)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        step, b, c = (part.contiguous() for part in projected.split(sizes, dim=-1))
        dt, _ = self.dt_proj(self.dt_layernorm(step))
        return dt, self.b_layernorm(b), self.c_layernorm(c)

    def forward(
        self,
        *,
        hidden_states: Tensor,
        output: Tensor | None,
        layer_cache: Any,
        metadata: Mamba2Metadata,
        mup_vector: Tensor | None = None,
        use_triton_causal_conv: bool = False,
    ) -> tuple[Tensor, None, None]:
        """Called by SGLang's backend for Mamba-2 with prompts first, then one token per decode.

        The two Nones say that no state is left to track: the scan has done so.
        """
        if metadata.is_target_verify:
            raise NotImplementedError("Jamba has no speculative decoding: drop its flags")
        prompts, decodes = metadata.num_prefill_tokens, metadata.num_decodes
        total = prompts + decodes
        x, gate = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
        mixed = torch.empty(x.shape, dtype=hidden_states.dtype, device=x.device)
        mixed[total:] = 0  # rows beyond the batch are padding, and must stay finite
        shared = {
            "A": -torch.exp(self.A_log.float()),
            "conv_state": layer_cache.conv[0],
            "ssm_state": layer_cache.temporal,
            "conv_weights": self.conv1d.weight.squeeze(1),
            "use_triton_causal_conv": use_triton_causal_conv,
        }
        slots = metadata.mamba_cache_indices
        if prompts:
            self._forward_prefill(
                x=x[:prompts],
                gate=gate[:prompts],
                out=mixed[:prompts],
                state_indices=slots[: metadata.num_prefills],
                query_start_loc=metadata.query_start_loc[: metadata.num_prefills + 1],
                metadata=metadata,
                **shared,
            )
        if decodes:
            self._forward_decode(
                x=x[prompts:total],
                gate=gate[prompts:total],
                out=mixed[prompts:total],
                state_indices=slots[metadata.num_prefills : metadata.num_prefills + decodes],
                **shared,
            )
        projected, _ = self.out_proj(mixed)
        if output is not None:
            output.copy_(projected)
        return projected, None, None

    def _forward_prefill(
        self,
        *,
        x: Tensor,
        gate: Tensor,
        out: Tensor,
        A: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        conv_weights: Tensor,
        state_indices: Tensor,
        query_start_loc: Tensor,
        metadata: Mamba2Metadata,
        use_triton_causal_conv: bool,
    ) -> None:
        mixed, bias = metadata.mixed_metadata, self.conv1d.bias
        has_initial = mixed.has_initial_states[: state_indices.numel()]
        dtype = conv_state.dtype  # of inputs, weights and states alike, whatever the model's
        inputs = x.to(dtype)
        snapshots = self._track(inputs, conv_state, state_indices, metadata)
        convolve = (
            mamba.causal_conv1d_fn_triton if use_triton_causal_conv else mamba.causal_conv1d_fn
        )
        convolved = convolve(
            inputs.transpose(0, 1),
            conv_weights.to(dtype),
            None if bias is None else bias.to(dtype),
            activation=self.activation,
            conv_states=conv_state,
            has_initial_state=has_initial,
            cache_indices=state_indices,
            query_start_loc=query_start_loc,
            seq_lens_cpu=mixed.extend_seq_lens_cpu,
        )
        convolved = convolved.transpose(0, 1)[: x.shape[0]].to(x.dtype).contiguous()
        dt, b, c = self._ssm_params(convolved)
        states = ssm_state.squeeze(2)  # [slots, channels, 1, state]
        selective_scan(
            convolved, dt, gate, A, b, c, self.D, states, state_indices, query_start_loc,
            has_initial, out, *snapshots,
        )  # fmt: skip

    def _track(
        self, inputs: Tensor, conv_state: Tensor, slots: Tensor, metadata: Mamba2Metadata
    ) -> tuple[Tensor, ...]:
        """Store the convolution's part of the states that SGLang wants from inside the prompts.

        Return where the scan leaves the rest: per prompt, the token of the batch before which, and
        the slot; empty if no state is wanted.
        """
        if not metadata.has_mamba_track_mask:
            return ()
        windows, rows = metadata.track_conv_indices, metadata.mamba_track_mask_indices
        targets = metadata.conv_states_mask_indices
        conv_state[targets] = inputs[windows].transpose(1, 2)
        ends, homes = torch.full_like(slots, -1), torch.full_like(slots, -1)
        ends[rows] = (windows[:, -1] + 1).to(ends.dtype)
        homes[rows] = targets.to(homes.dtype)
        return ends, homes
