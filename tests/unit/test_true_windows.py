"""What a plan says of windows that SGLang's code reads beyond, and of the switch for them."""

from __future__ import annotations

import pytest

from sglang_jenga.plan.hf_config import read_geometry

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 1024,
    "torch_dtype": "bfloat16",
}
IGNORED = (
    "the config names a window of 1024 tokens, which SGLang's code for MistralForCausalLM does not "
    "keep to: every layer is stored in full; "
)


@pytest.mark.parametrize(
    ("context", "saving"),
    [
        # 4 layers of 2 heads of 16 and 16 in bfloat16 are 512 bytes a token, and its slot is 64.
        (
            8192,
            "with --jenga-true-windows it does, and a request of 8192 tokens takes 1.00 MiB in "
            "place of 4.00 MiB",
        ),
        (
            1024,
            "--jenga-true-windows would save nothing: no request is longer than the window",
        ),
    ],
)
def test_a_window_that_sglang_ignores_is_told_with_what_the_switch_would_save(context, saving):
    config = MISTRAL | {"max_position_embeddings": context}

    assert read_geometry(config).notes == (IGNORED + saving,)
    assert read_geometry(config, true_windows=True).notes == ()


def test_a_config_without_a_window_has_nothing_to_tell():
    assert read_geometry(MISTRAL | {"sliding_window": None}).notes == ()
