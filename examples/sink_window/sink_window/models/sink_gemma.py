"""Gemma-3 under a name of its own: SGLang's code, found by the architecture in config.json."""

from sglang.srt.models.gemma3_causal import Gemma3ForCausalLM


class SinkGemmaForCausalLM(Gemma3ForCausalLM):
    """Its window layers are of the type ``sink_window`` in the model table."""


EntryClass = SinkGemmaForCausalLM
