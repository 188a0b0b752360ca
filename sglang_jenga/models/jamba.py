"""Jamba (``JambaForCausalLM``): Mamba-1 layers, every eighth or so full attention, and behind each
of them a feed-forward part, dense or a mixture of experts.

Positions enter through the states alone: attention has none. Weights are named as AI21's published
checkpoints and transformers name them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix, make_layers
from torch import Tensor, nn

from sglang_jenga.models.jamba_config import JambaConfig
from sglang_jenga.models.jamba_mixer import JambaMixer

Quantisation: TypeAlias = QuantizationConfig | None
# Where a weight of the checkpoint goes that is part of a larger one here: its name there, the name
# here, and which part it is.
STACKED = (
    ("q_proj", "qkv_proj", "q"),
    ("k_proj", "qkv_proj", "k"),
    ("v_proj", "qkv_proj", "v"),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
)


class JambaAttention(nn.Module):
    def __init__(
        self, config: JambaConfig, layer_id: int, quant_config: Quantisation, prefix: str
    ) -> None:
        super().__init__()
        ranks = get_parallel().attn_tp_size
        head_dim = getattr(config, "head_dim", None)  # as transformers reads it
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads // ranks
        kv_heads = max(1, config.num_key_value_heads // ranks)
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.attn = RadixAttention(
            heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, hidden: Tensor, forward_batch: ForwardBatch) -> Tensor:
        q, k, v = self.qkv_proj(hidden)[0].split(self.sizes, dim=-1)
        return self.o_proj(self.attn(q, k, v, forward_batch))[0]


class JambaMLP(nn.Module):
    def __init__(self, config: JambaConfig, quant_config: Quantisation, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )
        self.act = SiluAndMul()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_up_proj(hidden)[0]))[0]


class JambaExperts(nn.Module):
    """The weights of the chosen experts are those of the softmax over all: they do not sum to 1."""

    def __init__(
        self, config: JambaConfig, layer_id: int, quant_config: Quantisation, prefix: str
    ) -> None:
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            quant_config=None,
            prefix=add_prefix("router", prefix),
        )
        chosen = config.num_experts_per_tok
        self.topk = TopK(top_k=chosen, layer_id=layer_id, renormalize=False)
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            top_k=chosen,
            layer_id=layer_id,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            reduce_results=True,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.topk.bind_runner_backend(self.experts.runner_backend)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden, self.topk(hidden, self.router(hidden)[0]))


class JambaDecoderLayer(nn.Module):
    def __init__(
        self, config: JambaConfig, layer_id: int, quant_config: Quantisation, prefix: str
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        if layer_id in config.full_attention_layer_ids:
            prefix_of = add_prefix("self_attn", prefix)
            self.self_attn = JambaAttention(config, layer_id, quant_config, prefix_of)
        else:
            self.mamba = JambaMixer(config, quant_config, add_prefix("mamba", prefix))
        prefix_of = add_prefix("feed_forward", prefix)
        if config.layers_num_experts[layer_id] > 1:
            self.feed_forward = JambaExperts(config, layer_id, quant_config, prefix_of)
        else:
            self.feed_forward = JambaMLP(config, quant_config, prefix_of)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, forward_batch: ForwardBatch, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        if hasattr(self, "self_attn"):
            hidden = self.self_attn(hidden, forward_batch)
        else:
            hidden = self._mix(hidden, forward_batch)
        hidden, residual = self.pre_ff_layernorm(hidden, residual)
        return self.feed_forward(hidden), residual

    def _mix(self, hidden: Tensor, forward_batch: ForwardBatch) -> Tensor:
        output = torch.empty_like(hidden)
        # The CUDA convolution would take the pool's strided states for dense ones; Triton's does
        # not.
        get_attn_backend().linear_attn_backend.forward(
            self.mamba,
            hidden,
            output,
            layer_id=self.layer_id,
            forward_batch=forward_batch,
            use_triton_causal_conv=True,
        )
        return output


class JambaModel(nn.Module):
    def __init__(self, config: JambaConfig, quant_config: Quantisation, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
        )
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: JambaDecoderLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.final_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, forward_batch, residual)
        return self.final_layernorm(hidden, residual)[0]


class JambaForCausalLM(nn.Module):
    def __init__(
        self, config: JambaConfig, quant_config: Quantisation = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.model = JambaModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("lm_head", prefix),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden = self.model(input_ids, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights of a checkpoint, all or, where a running server changes some, a few.

        Raises:
            ValueError: a weight that has no place in this model.
        """
        params = dict(self.named_parameters())
        experts = FusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="gate_proj",
            ckpt_down_proj_name="down_proj",
            ckpt_up_proj_name="up_proj",
            num_experts=self.config.num_experts,
        )
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            place, part = _place_of(name, experts)
            if place not in params:
                raise ValueError(f"the checkpoint holds {name}, for which Jamba has no place")
            load = getattr(params[place], "weight_loader", default_weight_loader)
            load(params[place], weight, **part)


def _place_of(name: str, experts: list[tuple[str, str, int, str]]) -> tuple[str, dict[str, Any]]:
    """The parameter that a weight of the checkpoint goes into, and as which part of it."""
    if ".experts." in name:
        for target, part, expert, shard in experts:
            if part in name:
                place = name.replace(part, target)
                return place, {"weight_name": place, "shard_id": shard, "expert_id": expert}
    elif ".mamba." not in name:
        for part, target, index in STACKED:
            if f".{part}." in name:
                return name.replace(part, target), {"loaded_shard_id": index}
    return name, {}


EntryClass = JambaForCausalLM
