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

FLAG = "--jenga-true-windows"


def refusal(architecture: str, rows: Mapping[str, ModelRow], read: Read) -> str:
    """The sentence for a model on which the switch means nothing, or an empty text."""
    row = rows.get(architecture)
    if row is None or row.true_windows is None:
        names = sorted(name for name, of_model in rows.items() if of_model.true_windows is not None)
        why = f"it is for {' and '.join(names)} alone"
    elif ("window",) not in row.true_windows.stored_layers(read):
        why = "its config gives no layer a window"
    else:
        return ""
    return f"{FLAG} does not fit {architecture}: {why}; drop {FLAG}"


def saving(row: ModelRow, read: Read, context: int, *, tp: int, itemsize: int) -> str:
    """What the switch would save of a request as long as the context, on one of ``tp`` ranks; empty
    for a model whose windows are stored as such without it."""
    true = row.true_windows
    if true is None or ("window",) in row.stored_layers(read):
        return ""
    windows = true.stored_layers(read).count(("window",))
    width = true.window.stored(read)
    if not windows or width is None:
        return ""
    if context <= width:
        return f"{FLAG} would save nothing: no request is longer than the window"
    token_bytes = true.heads(read).window.row_elements(tp) * itemsize * windows
    return (
        f"with {FLAG} it does, and a request of {context} tokens takes "
        f"{format_bytes(width * token_bytes)} in place of {format_bytes(context * token_bytes)}"
    )
