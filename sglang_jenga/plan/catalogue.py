"""What the SGLang and the Transformers that this package is for know of models.

Read from catalogue.json, which `sglang_jenga.boot.write_catalogue` writes (`make docs`): a plan
imports neither of them. Stdlib only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.plan import config_schema

PATH = Path(__file__).with_name("catalogue.json")
_NOT_FILLED_IN = ("model_type", "dtype", "torch_dtype", "hybrid_override_pattern")
FIELDS = tuple(
    name for name in config_schema.FIELD_NAMES if "." not in name and name not in _NOT_FILLED_IN
)
"""Fields whose defaults matter to a plan. A pattern is no default where the config has a list."""
ROPES_THAT_SCALE = ("linear", "dynamic")
"""Kinds of rope whose factor makes the context of most models longer. For the others Transformers
writes down the context they were trained with, and then SGLang takes the length as it is."""


class ConfigType(NamedTuple):
    """A config class of Transformers, or of SGLang, by its ``model_type``.

    ``text`` is the type of the section about the language model, if that may name none. ``fields``
    are values of the language model's fields that a config.json leaves out; those computed from
    others are not among them. ``names``
    maps fields to the names that this class stores them under. ``ropes``: see `ROPES_THAT_SCALE`.
    """

    text: str = ""
    fields: Mapping[str, Any] = {}
    names: Mapping[str, str] = {}
    ropes: Sequence[str] = ROPES_THAT_SCALE


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return content


def config_type(model_type: str | None) -> ConfigType | None:
    """Return what is known of configs of this type, None for a type that nobody registered."""
    known = _content()["types"].get(model_type)
    return None if known is None else ConfigType(**known)


@functools.cache
def _names(key: str) -> frozenset[str]:
    return frozenset(_content()[key])


def is_native(architectures: Sequence[str]) -> bool:
    """Whether SGLang has code of its own for one of them."""
    return not _names("native").isdisjoint(architectures)


def falls_back(architectures: Sequence[str]) -> bool:
    """Whether SGLang runs all of them by what Transformers has."""
    return _names("fallback").issuperset(architectures)


def has_code(architectures: Sequence[str]) -> bool:
    """Whether SGLang runs a model that names these, by its own code or by Transformers'."""
    return is_native(architectures) or falls_back(architectures)
