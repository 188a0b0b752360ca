"""What a carrier that sees images has beside its config.

SGLang's tokenizer process loads a model's processor as it boots, though a replay's requests do not
come through it.
"""

from __future__ import annotations

from pathlib import Path


def write_processor(folder: Path) -> None:
    """Write Llama 3.2 Vision's tokenizer (of bytes) and image processor to `folder`."""
    from transformers import MllamaImageProcessor, MllamaProcessor

    from sglang_jenga.testing.tiny_models import write_tokenizer

    tokenizer = write_tokenizer(folder, ("<|image|>", "<|python_tag|>"))
    MllamaProcessor(MllamaImageProcessor(), tokenizer).save_pretrained(folder)
