"""Models that SGLang has no code for and this package brings, with the flag and without it.

SGLang's own doors are used: transformers' table of configs, its registry of models with states, and
its registry of model classes. Where SGLang has code for a model by now, or another package has
registered some, nothing is.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from sglang_jenga.boot import hook_table, hooks

ARCHITECTURE = "JambaForCausalLM"
_PACKAGE = "sglang_jenga.models"
_BACKEND = "sglang.srt.layers.attention.hybrid_linear_attn_backend.Mamba2AttnBackend"

_logger = logging.getLogger(__name__)
_ours: bool | None = None  # unknown before the config has been registered
_looks_up = False


def register_config() -> None:
    """Make SGLang read Jamba's config as that of a model with states.

    For whoever resolves a configuration, and for schedulers, before either reads a config.
    """
    global _ours
    if _ours is not None:
        return
    _ours = False
    try:
        hooks.check(hook_table.MODEL_CONFIGS)
    except hooks.HookError as error:
        _logger.warning("%s is not available: %s", ARCHITECTURE, error)
        return
    from sglang.srt.configs import linear_attn_model_registry as registry

    known = importlib.util.find_spec("sglang.srt.models.jamba") is not None
    if known or registry.get_linear_attn_spec_by_arch(ARCHITECTURE) is not None:
        return
    from transformers import AutoConfig

    from sglang_jenga.models.jamba_config import JambaConfig

    AutoConfig.register(JambaConfig.model_type, JambaConfig, exist_ok=True)
    registry.register_linear_attn_model(
        registry.LinearAttnModelSpec(
            config_class=JambaConfig,
            backend_class_name=_BACKEND,
            arch_names=[ARCHITECTURE],
            support_mamba_cache_extra_buffer=True,
        )
    )
    _ours = True


def await_lookup() -> None:
    """Register the class when this scheduler looks for it: its imports are those of a model."""
    global _looks_up
    if not _ours or _looks_up:
        return
    try:
        hooks.apply(hook_table.MODEL_CLASSES)
        _looks_up = True
    except (ImportError, hooks.HookError) as error:
        _logger.warning("%s is not available: %s", ARCHITECTURE, error)


def register_class(model_config: Any) -> None:
    from sglang.srt.models.registry import ModelRegistry

    wanted = ARCHITECTURE in (model_config.hf_config.architectures or ())
    if wanted and not ModelRegistry.is_arch_supported(ARCHITECTURE):
        ModelRegistry.register(_PACKAGE, strict=True)
