"""The operators of sgl_kernel that can be had without its libraries.

Any other one fails when it is called.
"""

import torch


def moe_align_block_size(
    ids, num_experts, block, sorted_ids, experts, padded, sums, pad=False, ignore=False
):
    # Not above: SGLang imports this file while it is itself being imported.
    from sglang.kernels.ops.moe.moe_align import moe_align_block_size as compiled_by_sglang

    if ignore:
        raise NotImplementedError("experts that are to be ignored")
    compiled_by_sglang(ids, num_experts, block, sorted_ids, experts, padded, sums, pad)


def moe_sum_reduce(expert_outputs, out, factor):
    torch.sum(expert_outputs, dim=1, out=out)
    if factor != 1:
        out.mul_(factor)


library = torch.library.Library("sgl_kernel", "FRAGMENT")
library.define(
    "moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_ids, "
    "Tensor! experts_ids, Tensor! num_tokens_post_pad, Tensor! cumsum_buffer, "
    "bool pad_sorted_token_ids=False, bool ignore_invalid_expert=False) -> ()"
)
library.impl("moe_align_block_size", moe_align_block_size, "CUDA")
library.define("moe_sum_reduce(Tensor input, Tensor! output, float routed_scaling_factor) -> ()")
library.impl("moe_sum_reduce", moe_sum_reduce, "CUDA")
