"""--jenga-true-windows: where SGLang's code reads beyond a window, models run as in Transformers.

For `MistralForCausalLM` SGLang 0.5.23 attends over everything; where its Transformers fallback runs
a model, a layer sees one token more than Transformers' own. The switch changes answers against
stock SGLang's, towards the reference, so nothing turns it on but the user. A row of the table of
models with a ``true_windows`` says that it means something there. Stdlib only.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_jenga.plan.layer_lists import Read
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.plan.spec import format_bytes
from sglang_jenga.plan.state_sizes import slot_beside

FLAG = "--jenga-true-windows"
_WINDOW = ("window",)


def refusal(architecture: str, rows: Mapping[str, ModelRow], read: Read) -> str:
    """The sentence for a model on which the switch means nothing, or an empty text."""
    row = rows.get(architecture)
    if row is None or row.true_windows is None:
        names = sorted(name for name, of_model in rows.items() if of_model.true_windows is not None)
        why = f"it is for {' and '.join(names)} alone"
    elif _WINDOW not in row.true_windows.stored_layers(read):
        why = "its config gives no layer a window"
    else:
        return ""
    return f"{FLAG} does not fit {architecture}: {why}; drop {FLAG}"


def ignored(architecture: str, window: int) -> str:
    """What a plan says of a window that SGLang's code does not keep to."""
    return (
        f"the config names a window of {window} tokens, which SGLang's code for {architecture} "
        "does not keep to: every layer is stored in full"
    )


def note(
    architecture: str, row: ModelRow, read: Read, context: int, *, tp: int, itemsize: int
) -> tuple[str, ...]:
    """That, and what the switch would save of a request as long as the context, on one of ``tp``
    ranks; nothing for a model whose windows are stored as such without it."""
    true = row.true_windows
    if true is None or _WINDOW in row.stored_layers(read):
        return ()
    layers, width = true.stored_layers(read), true.window.stored(read)
    windows = layers.count(_WINDOW)
    if not windows or width is None:
        return ()
    if context <= width:
        saving = f"{FLAG} would save nothing: no request is longer than the window"
    else:
        token_bytes = true.heads(read).window.row_elements(tp) * itemsize * windows
        # With no layer of full attention, slots of their own name a request's tokens.
        names = 0 if ("full",) in layers else context * slot_beside(token_bytes)
        taken, stock = width * token_bytes + names, context * token_bytes
        saving = (
            f"with {FLAG} it does, and a request of {context} tokens takes "
            f"{format_bytes(taken)} in place of {format_bytes(stock)}"
        )
    return (f"{ignored(architecture, width)}; {saving}",)
