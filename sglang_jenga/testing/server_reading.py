"""What a server makes of a model's config, in a launcher process and without weights.

Answers what a plan answers, so that the two can be compared: is the model served, with which layer
groups, and does stock SGLang have a pool for its windows.
"""

from __future__ import annotations

from typing import Any

from sglang_jenga.boot import boot_check, model_rules, own_models, window_models
from sglang_jenga.boot.geometry import geometry_of
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.plugin import activate


def read_as_server(
    path: str, tp: int = 1, true_windows: bool = False, **arguments: Any
) -> dict[str, Any]:
    """Return ``refused`` (lines), ``groups`` (fields of each), ``stock_stores_windows`` and
    ``context``, the tokens of the longest request.

    Groups are those of one rank that has the model to itself, whatever ``tp`` says.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import create_context, use_context
    from sglang.srt.server_args import ServerArgs

    activate()
    own_models.register_config()
    server_args = ServerArgs(model_path=path, device="cpu", page_size=1, **arguments)
    try:
        window_models.enable(False)
        stock = ModelConfig.from_server_args(server_args)
        window_models.enable(True, true_windows=true_windows)
        model = ModelConfig.from_server_args(server_args)
        refused = model_rules.refused_lines(model)
        if true_windows:
            refused = refused or model_rules.true_windows_lines(model)
        found = {
            "refused": refused or model_rules.ranks_lines(model, tp),
            "groups": [],
            "stock_stores_windows": stock.is_hybrid_swa,
            "context": model.context_len,
        }
        if not found["refused"]:
            # Settles the formats, and what else SGLang makes of the model.
            with use_context(create_context(server_args, role="scheduler")):
                # A context resolves its record, which asks for nothing.
                window_models.enable(True, true_windows=true_windows)
                groups = geometry_of(boot_check.Foreseen(model)).groups
            found["groups"] = [group_fields(group) for group in groups]
        return found
    finally:
        window_models.enable(False)


def group_fields(group: LayerGroup) -> list[Any]:
    """What a plan and a server must agree on, as JSON holds it."""
    return [
        group.kind.name,
        list(group.layer_ids),
        group.entry_bytes,
        group.tokens_per_page,
        group.window,
    ]
