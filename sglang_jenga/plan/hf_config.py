"""Layer groups of a model, read from its Hugging Face config.json without loading anything.

Also states how stock SGLang 0.5.23 would store the same model, so that both can be compared, and
whether the server takes it. What a config means is the table of models' to say (`layer_rules`).
A config is a plain dict here; nothing of transformers, torch or SGLang is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.registry import sliding_kind
from sglang_jenga.layers.state import State
from sglang_jenga.plan import catalogue, config_schema, kv_format, layer_rules, model_fields
from sglang_jenga.plan import true_windows as true_window_rules
from sglang_jenga.plan.head_shapes import LayerHeads
from sglang_jenga.plan.layer_lists import PLACES, LayerList, Read
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.plan.state_sizes import SLOT_BYTES, UnevenRanksError
from sglang_jenga.plan.stock import StockLayout

FALLBACK = (
    "SGLang 0.5.23 has no code of its own for it: served if its Transformers fallback takes it"
)
_STOCK_SLOTS = 3  # MAMBA_CACHE_SIZE_MAX_RUNNING_REQUESTS_RATIO
_STOCK_TRACKING_SLOTS = 2  # beside those, where SGLang tracks states inside prompts


@dataclass(frozen=True, slots=True)
class ConfigLayers:
    """What a model asks of one rank's pool.

    ``refused`` is the sentence by which a server refuses the model, empty if it serves it; a model
    that is refused may have no ``groups``. ``context_tokens`` bounds a request; None where the
    layers of a refused model are not read. ``states`` is the number of state slots a running
    request takes with the server's default strategy (0 = no state layers). ``encoder`` is the
    number of tokens that cross-attention layers hold of one image.
    """

    architecture: str
    groups: tuple[LayerGroup, ...]
    stock: StockLayout | None
    context_tokens: int | None = None
    states: int = 0
    encoder: int = 0
    refused: str = ""
    notes: tuple[str, ...] = ()

    @property
    def stock_summary(self) -> str:
        """How stock SGLang stores the model, in words; empty where nobody asked."""
        return "" if self.stock is None else self.stock.summary


def read_geometry(
    config: Mapping[str, Any],
    *,
    page_size: int = 1,
    tp: int = 1,
    kv_cache_dtype: str = "auto",
    dtype: str = "auto",
    quantisation: Mapping[str, Any] | None = None,
    true_windows: bool = False,
) -> ConfigLayers:
    """Read the layer groups of one of `tp` ranks.

    Args:
        config: the parsed config.json; the section of the language model is looked into.
        page_size: SGLang's tokens per page, the tokens per small page of every KV group.
        kv_cache_dtype, dtype: the server's flags of these names.
        quantisation: the parsed hf_quant_config.json, if the checkpoint has one.
        true_windows: the server's flag --jenga-true-windows.

    Raises:
        ValueError: a field of the wrong type, a missing one, an unknown layer type or dtype.
    """
    for flag, value in (("--page-size", page_size), ("--tp", tp)):
        if value <= 0:
            raise ValueError(f"{flag} must be above 0, got {value}")
    config_schema.check(config)
    config_schema.check({"quantization_config": quantisation}, where="hf_quant_config.json: ")
    architectures = config_schema.architectures_of(config)
    architecture = architectures[0]
    row = layer_rules.row_of(architectures, true_windows=true_windows)
    fields = model_fields.of_config(config, row.defaults)
    read = fields.read
    itemsize = kv_format.kv_itemsize(
        config,
        fields.stated,
        kv_cache_dtype=row.kv_cache_dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
        dtype=dtype,
        quantisation=quantisation,
    )
    no_code = _no_code(config, architectures)
    why = row.why_refused(read) or no_code
    refused = layer_rules.refusal(architecture, why) if why else ""
    if row.layers is None or no_code or row.why_wrong(read):
        return ConfigLayers(architecture, (), None, refused=refused)

    if true_windows and not why:
        refused = true_window_rules.refusal(architecture, layer_rules.MODELS, read)
        if refused:
            return ConfigLayers(architecture, (), None, refused=refused)
    layers = row.stored_layers(read)
    heads = row.heads(read) if any(set(kinds) - {"state"} for kinds in layers) else None
    refused = refused or ranks_refusal(architecture, row, read, tp)
    if refused and not why:
        return ConfigLayers(architecture, (), None, refused=refused)
    has_states = any("state" in kinds for kinds in layers)
    if has_states:
        refused = refused or _page_refusal(row, read, page_size)
    elif ("cross",) in layers and page_size > 1:
        refused = refused or layer_rules.flag_refusal(
            "--page-size", layer_rules.ENCODER_PAGES, value=page_size
        )
    encoder = row.encoder(config) if row.encoder is not None else 0
    reading = _Reading(architecture, row, read, layers, heads, itemsize, page_size, tp)
    groups = reading.groups()
    context = fields.context_length()
    unused = true_window_rules.note(architecture, row, read, context, tp=tp, itemsize=itemsize)
    return ConfigLayers(
        architecture,
        groups,
        reading.stock_layout(),
        context,
        has_states + (has_states and row.tracks),
        encoder,
        refused,
        (*_notes(architectures, row, fields.stated, encoder), *unused),
    )


def ranks_refusal(architecture: str, row: ModelRow, read: Read, tp: int) -> str:
    """The sentence for a number of ranks that SGLang's layers cannot be shared by, or an empty
    text. SGLang asserts it, with a trace."""
    layers = row.stored_layers(read)
    why = ""
    if any(set(kinds) - {"state"} for kinds in layers):
        query, kv = read("num_attention_heads"), row.heads(read)
        counts = [kv.full.count, *([kv.window.count] if ("window",) in layers else [])]
        if query is not None and query % tp:
            why = f"{tp} ranks cannot share its {query} query heads"
        for count in counts:
            if (count % tp if count >= tp else tp % count) and not why:
                why = f"{tp} ranks cannot share its {count} KV heads"
    if row.state is not None and not why:
        try:
            row.state(read, tp)
        except UnevenRanksError as error:
            why = str(error)
    return f"--tp {tp} does not fit {architecture}: {why}" if why else ""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A config and its row, with the numbers of one rank. ``layers``: see `layer_lists`."""

    architecture: str
    row: ModelRow
    read: Read
    layers: LayerList
    heads: LayerHeads | None
    itemsize: int
    page_size: int
    tp: int

    def groups(self) -> tuple[LayerGroup, ...]:
        names = ("full", "window", "cross", "state")
        full_ids, window_ids, cross_ids, state_ids = map(self._ids, names)
        if not (full_ids or window_ids or cross_ids or state_ids):
            raise ValueError("no layer of this config keeps KV or state")
        # Without a layer of its own it still names tokens.
        slot_bytes = len(full_ids) * self._row_bytes("full") or SLOT_BYTES
        groups = [LayerGroup(Full(), full_ids, slot_bytes, self.page_size)]
        width = self.row.window.stored(self.read)  # without one no layer is a window's
        if window_ids and width is not None:
            kind: LayerKind = sliding_kind(self.row.sliding, width)
            entry_bytes = len(window_ids) * self._row_bytes("window")
            groups.append(LayerGroup(kind, window_ids, entry_bytes, self.page_size))
        if cross_ids:
            entry_bytes = len(cross_ids) * self._row_bytes("cross")
            groups.append(LayerGroup(Cross(), cross_ids, entry_bytes, self.page_size))
        if state_ids:
            groups.append(LayerGroup(State(), state_ids, self._state_bytes()))
        return tuple(groups)

    def stock_layout(self) -> StockLayout:
        counts = {kind: len(self._ids(kind)) for kind in PLACES}
        in_full = counts["full"] + counts["window"] + counts["cross"]
        if counts["state"]:
            slots = _STOCK_SLOTS + (_STOCK_TRACKING_SLOTS if self.row.tracks else 0)
            return StockLayout(
                in_full * self._row_bytes("full"),
                state_bytes=self._state_bytes(),
                states_per_request=slots,
                page_size=self.page_size,
                summary=f"states get 0.9/1.9 of the bytes, {slots} slots per running request",
            )
        if counts["window"] and self.row.stock_stores_windows:
            return StockLayout(
                counts["full"] * self._row_bytes("full"),
                counts["window"] * self._row_bytes("window"),
                self.row.window.stored(self.read),
                page_size=self.page_size,
                summary="window pool holds 0.8 tokens per token of the full pool",
            )
        return StockLayout(
            in_full * self._row_bytes("full"),
            page_size=self.page_size,
            summary=f"all {in_full} attention layers stored for every token",
        )

    def _ids(self, kind: str) -> tuple[int, ...]:
        return tuple(layer for layer, kinds in enumerate(self.layers) if kind in kinds)

    def _row_bytes(self, kind: str) -> int:
        """One token's K and V bytes in one layer, on one rank."""
        if self.heads is None:
            return 0
        heads = self.heads.window if kind == "window" else self.heads.full
        return heads.row_elements(self.tp) * self.itemsize

    def _state_bytes(self) -> int:
        """One request's state over all layers, on one rank."""
        if self.row.state is None:
            raise ValueError(f"{self.architecture}: the table of models does not size its states")
        return len(self._ids("state")) * self.row.state(self.read, self.tp)


def _page_refusal(row: ModelRow, read: Read, page_size: int) -> str:
    """The sentence for a page size that a model with states does not take."""
    if row.tracks:
        chunk = read("mamba_chunk_size") or layer_rules.CHUNK
        return layer_rules.tracked_pages_refusal(page_size, layer_rules.TRACK_INTERVAL, chunk)
    if page_size == 1:
        return ""
    return layer_rules.flag_refusal(
        "--page-size", layer_rules.PAGES_WITHOUT_TRACKING, value=page_size
    )


def _no_code(config: Mapping[str, Any], architectures: list[str]) -> str:
    """The reason for a model that SGLang stops at: it has no code for it, and Transformers none
    that its fallback takes. What comes with the checkpoint it may take."""
    brings_code = "AutoModel" in (config.get("auto_map") or {})
    if brings_code or catalogue.has_code(architectures) or layer_rules.has_row(architectures):
        return ""
    return layer_rules.NO_CODE


def _notes(
    architectures: list[str], row: ModelRow, stated: Mapping[str, Any], encoder: int
) -> tuple[str, ...]:
    notes = [row.note] if row.note else []
    if encoder:
        notes.append(f"each request has one image beside its tokens, of {encoder} more")
    known = layer_rules.has_row(architectures)
    if not catalogue.is_native(architectures) and (
        catalogue.falls_back(architectures) or not known
    ):
        notes.append(FALLBACK)
    window = stated.get("sliding_window")
    if window and not known and stated.get("use_sliding_window") is not False:
        notes.append(true_window_rules.ignored(architectures[0], window))
    return tuple(notes)
