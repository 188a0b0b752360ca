"""The fields of a language model as SGLang will read them from its config.json.

The file's own, under the names that rules ask for, and what the config class fills in where the
file says nothing. The class is the one that the ``model_type`` stands for; `catalogue` knows it.
Stdlib only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sglang_jenga.plan import catalogue, config_schema
from sglang_jenga.plan.catalogue import ROPES_THAT_SCALE, ConfigType

NO_LENGTH = 2048
"""SGLang's context of a model whose config does not say (``get_context_length``)."""
_CONTEXT_FIELDS = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)
_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "d_model"),
}
_NULL_MEANS_NONE = "sliding_window"
_ROPES = (*ROPES_THAT_SCALE, "yarn", "llama3", "longrope")


class ModelFields(NamedTuple):
    """``found``: fields by name; a field that is not there is one that SGLang finds None or not at
    all. ``stated``: those of the file alone. ``ropes``: kinds of rope that make a context longer;
    None for a class that nobody registered, which keeps a rope as the file has it."""

    found: Mapping[str, Any]
    stated: Mapping[str, Any]
    ropes: tuple[str, ...] | None

    def read(self, name: str) -> Any:
        return self.found.get(name)

    def context_length(self) -> int:
        """Tokens of the longest request, by the rule of SGLang's ``get_context_length``."""
        lengths = (self.read(name) for name in _CONTEXT_FIELDS)
        length: int | None = next((length for length in lengths if length is not None), None)
        if length is None:
            return NO_LENGTH
        return int(length * self._rope_factor())

    def _rope_factor(self) -> float:
        rope = self.read("rope_scaling") or self.read("rope_parameters") or {}
        factor: float = rope.get("factor") or 1
        kind = rope.get("rope_type") or (rope.get("type") if self.ropes is not None else None)
        if kind == "llama3" or "original_max_position_embeddings" in rope:
            return 1
        if self.ropes is not None and kind in _ROPES and kind not in self.ropes:
            return 1
        return factor


def of_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelFields:
    """Read a checked config. ``defaults``: of a row of the table of models, for a class that the
    catalogue does not know."""
    section = config_schema.section_of(config)
    known = _type_of(config, section)
    stated = {
        name: value
        for name, value in section.items()
        if value is not None or name == _NULL_MEANS_NONE
    }
    names = {} if known is None else known.names
    for name, others in _other_names(names):
        given = (stated[other] for other in others if stated.get(other) is not None)
        if stated.get(name) is None and (value := next(given, None)) is not None:
            stated[name] = value
    filled_in = {**defaults, **({} if known is None else known.fields)}
    # A null in the file is a value too: the class does not fill it in.
    missing = {
        name: value
        for name, value in filled_in.items()
        if name not in section and name not in stated
    }
    return ModelFields({**missing, **stated}, stated, None if known is None else tuple(known.ropes))


def _type_of(config: Mapping[str, Any], section: Mapping[str, Any]) -> ConfigType | None:
    whole = catalogue.config_type(config.get("model_type"))
    named = section.get("model_type")
    if section is config or named is None or (whole is not None and named == whole.text):
        return whole
    return catalogue.config_type(named) or whole


def _other_names(names: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in {**_OTHER_NAMES, **names}:
        own = (names[name],) if name in names else ()
        yield name, (*own, *_OTHER_NAMES.get(name, ()))
