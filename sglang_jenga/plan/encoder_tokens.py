"""How many tokens an encoder makes of one image, asked of a parsed config.json. Stdlib only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def mllama(config: Mapping[str, Any]) -> int:
    """Every image is padded to all its tiles, each of patches and one token more."""
    vision = config.get("vision_config")
    size, patch, tiles = (
        _count(vision if isinstance(vision, Mapping) else {}, name, default)
        for name, default in (("image_size", 448), ("patch_size", 14), ("max_num_tiles", 4))
    )
    return tiles * ((size // patch) ** 2 + 1)


def _count(section: Mapping[str, Any], name: str, default: int) -> int:
    value = section.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 20:
        raise ValueError(f"vision_config.{name} must be a whole number above 0, got {value!r}")
    return value
