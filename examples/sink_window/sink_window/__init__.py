"""Attention sinks beside a sliding window, as a layer type of sglang-jenga."""


def register() -> None:
    """The entry point of the group ``sglang_jenga.layers``."""
    from sglang_jenga.layers.registry import register_kind
    from sglang_jenga.plan import layer_lists
    from sglang_jenga.plan.layer_rules import register_model
    from sglang_jenga.plan.model_row import ModelRow
    from sink_window.kind import SinkWindow

    register_kind(SinkWindow)
    row = ModelRow(layers=layer_lists.by_layer_types(), sliding=SinkWindow.name)
    register_model("SinkGemmaForCausalLM", row)
