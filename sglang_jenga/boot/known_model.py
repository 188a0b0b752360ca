"""What the table of models says of the model that a server is about to load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_jenga.plan import layer_rules
from sglang_jenga.plan.layer_lists import Read
from sglang_jenga.plan.model_row import ModelRow


class KnownModel(NamedTuple):
    """A model's row, and how the row's rules read its config.

    ``listed``: the table names its architecture; otherwise ``row`` is that of all other models.
    """

    architecture: str
    row: ModelRow
    read: Read
    listed: bool


def of_config(architectures: Sequence[str], text_config: Any) -> KnownModel:
    """``text_config``: transformers' config object of the language model."""
    return KnownModel(
        architectures[0] if architectures else "",
        layer_rules.row_of(architectures),
        lambda name: getattr(text_config, name, None),
        layer_rules.has_row(architectures),
    )


def of_model(model: Any) -> KnownModel:
    """``model``: SGLang's ``ModelConfig``."""
    return of_config(model.hf_config.architectures, model.hf_text_config)
