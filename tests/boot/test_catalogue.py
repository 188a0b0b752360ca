"""plan/catalogue.json against the SGLang and the Transformers that are installed."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from sglang_jenga.boot import write_catalogue
from sglang_jenga.plan import catalogue
from sglang_jenga.testing.launcher import Launcher

CONTENT = json.loads(catalogue.PATH.read_text())


def test_it_is_of_the_packages_that_are_installed():
    assert CONTENT["sglang"] == version("sglang")
    assert CONTENT["transformers"] == version("transformers")


def test_it_names_the_models_that_sglang_has_code_for():
    assert CONTENT["native"] == write_catalogue.native_architectures()


def test_what_sglang_registers_is_native(launcher):
    registered = launcher.run(
        "from sglang.srt.models.registry import ModelRegistry\n"
        "answer = {'names': list(ModelRegistry.get_supported_archs())}"
    )["names"]

    assert len(registered) > 200
    assert set(registered) <= set(CONTENT["native"])


@pytest.mark.slow
def test_it_is_what_the_installed_packages_say():
    launcher = Launcher(HF_HUB_OFFLINE="1")  # before Transformers is imported
    try:
        text = launcher.run(
            "from sglang_jenga.boot import write_catalogue\n"
            "answer = {'text': write_catalogue.as_text(write_catalogue.written())}"
        )["text"]
    finally:
        launcher.close()

    assert text == catalogue.PATH.read_text()


def test_a_computed_default_is_not_in_it():
    """Llama has as many KV heads as heads unless its config says otherwise."""
    assert catalogue.config_type("llama").fields["num_attention_heads"] == 32
    assert "num_key_value_heads" not in catalogue.config_type("llama").fields
    assert catalogue.config_type("mistral").fields["num_key_value_heads"] == 8
    assert catalogue.config_type("gpt2").names["max_position_embeddings"] == "n_positions"
    assert catalogue.config_type("no such type") is None
