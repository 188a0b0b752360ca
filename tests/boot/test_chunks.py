"""Whether decode steps go inside chunks, where the user says nothing of it."""

from __future__ import annotations

from functools import cache

import pytest

from sglang_jenga.boot.chunks import CHUNK
from sglang_jenga.testing.tiny_models import write_tiny_model
from sglang_jenga.testing.tiny_vision import write_tiny_vision_model


@pytest.fixture(scope="module")
def of(launcher, tmp_path_factory):
    """The resolved chunk of a server, and whether decode steps go in it."""

    @cache
    def model_of(family: str) -> str:
        write = write_tiny_vision_model if family.endswith("_vision") else write_tiny_model
        return str(write(family.removesuffix("_vision"), tmp_path_factory.mktemp(family)))

    def resolved(family: str, flag: str = "jenga", **asked) -> tuple[int, bool]:
        outcome = launcher.engine(model_path=model_of(family), memory_backend=flag, **asked)
        assert outcome.end == "resolved", outcome.text
        return outcome.fields["chunk"], outcome.fields["mixed_chunk"]

    return resolved


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen3_next", "falcon_h1"])
def test_models_of_several_layer_types_decode_in_chunks(of, family):
    assert of(family) == (CHUNK, True)
    assert of(family, "default")[1] is False


def test_dense_models_are_served_as_without_the_flag(of):
    assert of("llama") == of("llama", "default")


def test_so_are_models_of_pictures(of):
    pictures = {"enable_multimodal": True}
    assert of("gemma3_vision", **pictures) == of("gemma3_vision", "default", **pictures)


@pytest.mark.parametrize(
    "asked",
    [
        {"chunked_prefill_size": 4096},
        {"chunked_prefill_size": -1},
        {"enable_mixed_chunk": True},
        {"disaggregation_mode": "prefill"},
        {"disaggregation_mode": "decode"},
        {"pp_size": 2},
        {"enable_deterministic_inference": True, "attention_backend": "triton"},
        {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
    ],
    ids=lambda asked: " ".join(f"{name}={value}" for name, value in asked.items()),
)
def test_what_the_user_gives_stands_and_servers_in_parts_take_prompts_by_themselves(of, asked):
    # The pool of retracted requests that stock chooses for a decode server takes CUDA.
    stock = {"disaggregation_decode_retraction_backup": "cpu_tensor"} | asked
    assert of("gemma3_text", **asked) == of("gemma3_text", "default", **stock)


def test_two_ranks_decode_in_chunks_as_one_does(of):
    assert of("gemma3_text", tp_size=2) == (CHUNK, True)
