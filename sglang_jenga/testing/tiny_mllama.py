"""Write a tiny Llama 3.2 Vision with random weights, and pictures to show it.

Five layers, of which two have cross attention, unless told otherwise; a picture has 4 tiles of 17
patches, 68 tokens, whatever its size. transformers and Pillow are imported when something is made,
not before.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import Pictured
from sglang_jenga.testing.tiny_models import VOCAB_SIZE, write_tokenizer

IMAGE_TOKENS = 68
TILE = 56  # pixels
IMAGE, _TOOL = "<|image|>", "<|python_tag|>"
_RECORD = "tiny_model.txt"

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 64,
    "image_size": TILE,
    "patch_size": 14,
    "max_num_tiles": 4,
    # The last layer's number would make SGLang take it twice.
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "cross_attention_layers": [1, 3],
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}


def write_tiny_mllama(
    folder: str | Path,
    *,
    num_layers: int = 5,
    cross_layers: tuple[int, ...] = (1, 3),
    hidden_size: int = 64,
    tile: int = TILE,
) -> Path:
    """Write config, weights, tokenizer and processor to `folder` and return it.

    Nothing is written if it holds this model already. The text's four heads share `hidden_size`.
    ``tile``: pixels of a picture's tiles on each side, 14 to a patch.
    """
    folder = Path(folder)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    recipe += repr((num_layers, cross_layers, hidden_size, tile))
    record = folder / _RECORD
    if record.exists() and record.read_text() == recipe:
        return folder
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_processor(folder, tile)
    config = MllamaConfig(
        vision_config=_VISION | {"image_size": tile},
        text_config=_TEXT
        | {
            "num_hidden_layers": num_layers,
            "cross_attention_layers": list(cross_layers),
            "hidden_size": hidden_size,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        dtype="float32",
    )
    model = MllamaForConditionalGeneration(config).float()
    _draw(model)
    model.save_pretrained(folder)
    record.write_text(recipe)  # last: a half-written folder is written again
    return folder


def write_processor(folder: Path, tile: int) -> Any:
    """Write tokenizer and processor to `folder` and return the tokenizer."""
    from transformers import MllamaImageProcessor, MllamaProcessor

    tokenizer = write_tokenizer(folder, (IMAGE, _TOOL))
    pictures = MllamaImageProcessor(size={"height": tile, "width": tile}, max_image_tiles=4)
    MllamaProcessor(pictures, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _draw(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            digest = hashlib.sha256(name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            noise = torch.randn(weight.shape, generator=generator)
            if "gate" in name and weight.numel() == 1:
                weight.fill_(1.0)  # transformers' 0 switches cross attention off
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif "embed" in name:
                weight.copy_(noise * (1.0 if "embed_tokens" in name else 0.3))
            else:
                fan_in = weight[0].numel() if weight.dim() > 1 else weight.numel()
                weight.copy_(noise * 1.6 / math.sqrt(fan_in))


def picture(seed: int, tiles_wide: int = 1, tiles_high: int = 1) -> str:
    """A picture of coloured squares as a data URL, the same for the same arguments."""
    import numpy as np
    from PIL import Image

    shape = (4 * tiles_high, 4 * tiles_wide, 3)
    squares = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    pixels = squares.repeat(TILE // 4, axis=0).repeat(TILE // 4, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def prompt(text: str, *pictures: str) -> Pictured:
    """A prompt with pictures before the text."""
    return Pictured(IMAGE * len(pictures) + text, pictures)
