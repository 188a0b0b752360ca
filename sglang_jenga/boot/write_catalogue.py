"""plan/catalogue.json, written from the SGLang and the Transformers that are installed:
``python -m sglang_jenga.boot.write_catalogue``.

What a plan must know of them and cannot ask, since it imports neither: which architectures they
have code for, and what a config class makes of the fields that a config.json leaves out.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_jenga.plan import catalogue, config_schema

PROBES: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 8},
    {"num_attention_heads": 64},
    {"hidden_size": 8192},
    {"hidden_size": 8192, "num_attention_heads": 64},
    {"num_hidden_layers": 8},
    {"num_key_value_heads": 2},
    {"head_dim": 32},
    {"mamba_expand": 4},
    {"expand": 4},
)
"""A default that moves with one of these is computed from it, and rules of ours do that."""
ROPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
_NO_MODELS = ("PreTrainedModel", "Processor", "Config")


def native_architectures() -> list[str]:
    """Architectures that a module of ``sglang.srt.models`` brings a class for. Read, not imported:
    some of the modules import only where there is a GPU."""
    spec = importlib.util.find_spec("sglang.srt.models")
    assert spec is not None and spec.submodule_search_locations
    found: set[str] = set()
    for path in Path(spec.submodule_search_locations[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(
                isinstance(target, ast.Name) and target.id == "EntryClass" for target in targets
            ):
                found.update(part.id for part in ast.walk(node.value) if isinstance(part, ast.Name))
    return sorted(found)


def fallback_architectures() -> list[str]:
    """Models of Transformers that SGLang's fallback takes (``resolve_transformers_arch``)."""
    import transformers

    found = []
    for name in dir(transformers):
        if not name[:1].isupper() or name.endswith(_NO_MODELS):
            continue
        if not ("Model" in name or "For" in name):
            continue
        try:
            model = getattr(transformers, name)
            takes = isinstance(model, type) and model.is_backend_compatible()
        except (AttributeError, ImportError):
            continue
        if takes:
            found.append(name)
    return sorted(found)


def config_types() -> dict[str, dict[str, Any]]:
    """Per ``model_type`` what `catalogue.ConfigType` says, empty fields left out."""
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = {}
    for name in sorted({*CONFIG_MAPPING.keys(), *_CONFIG_REGISTRY}):
        try:
            described = _describe(_CONFIG_REGISTRY.get(name) or CONFIG_MAPPING[name])
        except Exception:  # a class that cannot be made of nothing, or asks the network
            continue
        if described is not None:
            found[name] = described
    return found


def _describe(config_class: type) -> dict[str, Any] | None:
    parent = _made(config_class)
    text = _text_of(parent)
    if getattr(text, "num_attention_heads", None) is None and not _has_states(text):
        return None
    nested = text is not parent
    names = {
        name: other
        for name, other in (getattr(type(text), "attribute_map", None) or {}).items()
        if name in catalogue.FIELDS
    }
    ropes = [kind for kind in ROPES if _scales(type(text), kind)]
    described: dict[str, Any] = {"fields": dict(_constant_fields(type(text)))}
    if names:
        described["names"] = names
    if ropes != list(catalogue.ROPES_THAT_SCALE):
        described["ropes"] = ropes
    text_type = getattr(text, "model_type", "")
    return {"text": text_type, **described} if nested and text_type else described


def _made(config_class: type, **fields: Any) -> Any:
    config = config_class(**fields)
    if getattr(config, "is_heterogeneous", False):  # Gemma-4: shapes of its window layers
        config.allow_global_per_layer_attribute_access = True
    return config


def _text_of(config: Any) -> Any:
    """The part about the language model, as SGLang's ``get_hf_text_config`` finds it."""
    for name in config_schema.MODEL_SECTIONS:
        section = getattr(config, name, None)
        if section is not None and not isinstance(section, Mapping):
            return getattr(section, "text_config", section)
    return config


def _has_states(config: Any) -> bool:
    return any(getattr(config, name, None) for name in ("state_size", "ssm_state_size"))


def _constant_fields(config_class: type) -> Iterator[tuple[str, Any]]:
    plain = _made(config_class)
    changed = []
    for probe in PROBES:
        try:
            changed.append((probe, _made(config_class, **probe)))
        except Exception:  # a class may check that its fields fit each other
            continue
    for name in catalogue.FIELDS:
        value = getattr(plain, name, None)
        if type(value) not in (int, float, str, bool):
            continue
        if all(name in probe or getattr(one, name, None) == value for probe, one in changed):
            yield name, value


def _scales(config_class: type, kind: str) -> bool:
    """Whether a factor of this kind of rope makes SGLang's context longer."""
    from sglang.srt.utils.hf_transformers.common import get_context_length

    rope = {"rope_type": kind, "type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    base = {"max_position_embeddings": 1000}
    try:
        plain = get_context_length(_made(config_class, **base))
        scaled: int = get_context_length(_made(config_class, **base, rope_scaling=dict(rope)))
    except Exception:  # a class that does not take such a rope
        return kind in catalogue.ROPES_THAT_SCALE
    return scaled > plain


def written() -> dict[str, Any]:
    """What plan/catalogue.json must hold for what is installed."""
    import transformers
    from sglang.version import __version__

    native = native_architectures()
    return {
        "sglang": __version__,
        "transformers": transformers.__version__,
        "native": native,
        "fallback": sorted(set(fallback_architectures()) - set(native)),
        "types": config_types(),
    }


def as_text(content: Mapping[str, Any]) -> str:
    """One line per architecture and per type, so that a difference can be read."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            shown = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        elif isinstance(value, Mapping):
            lines = [f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()]
            shown = "{\n" + ",\n".join(lines) + "\n }"
        else:
            shown = json.dumps(value)
        parts.append(f' "{key}": {shown}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    # Before Transformers is imported: it would look for models, and complain of every probe.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    warnings.simplefilter("ignore")
    catalogue.PATH.write_text(as_text(written()), encoding="utf-8")


if __name__ == "__main__":
    main()
