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
    ``truly``: the row is the one under --jenga-true-windows.
    """

    architecture: str
    row: ModelRow
    read: Read
    listed: bool
    truly: bool = False


_true_windows = False


def expect_true_windows(on: bool) -> None:
    """Set whether the record that this process works on asks for --jenga-true-windows. As with
    jenga itself, SGLang asks of a model without saying for which record."""
    global _true_windows
    _true_windows = on


def of_config(architectures: Sequence[str], text_config: Any) -> KnownModel:
    """``text_config``: transformers' config object of the language model."""
    row = layer_rules.row_of(architectures, true_windows=_true_windows)
    return KnownModel(
        architectures[0] if architectures else "",
        row,
        lambda name: getattr(text_config, name, None),
        layer_rules.has_row(architectures),
        row is not layer_rules.row_of(architectures),
    )


def of_model(model: Any) -> KnownModel:
    """``model``: SGLang's ``ModelConfig``."""
    return of_config(model.hf_config.architectures, model.hf_text_config)
