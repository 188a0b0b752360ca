"""What is hooked of a prefill or decode server, beside what every scheduler has."""

from __future__ import annotations

from sglang_jenga.boot.hooks import Hook

_OURS = "sglang_jenga.serving.transfers"
_UTILS = "sglang.srt.disaggregation.utils"
_QUEUE = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
_PREFILL = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
_DECODE = "sglang.srt.disaggregation.decode.SchedulerDisaggregationDecodeMixin"

TRANSFERS = (
    Hook(
        f"{_UTILS}.build_kv_layer_ids",
        "after",
        "(*, token_to_kv_pool, draft_token_to_kv_pool, num_draft_entries, num_hidden_layers)",
        f"{_OURS}:kv_layer_ids",
        "a small page is one item with all layers of its group, not keys here and values there",
        "`_uses_flat_entry_layout` of Mooncake's: what makes it take one region as it is",
    ),
    Hook(
        f"{_UTILS}.get_pd_kv_layout",
        "after",
        "(token_to_kv_pool)",
        f"{_OURS}:kv_layout",
        "the two sides tell each other how their pages lie",
        "that a prefill server registers it, and who else reads it",
    ),
    Hook(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
        "around",
        "(self, bootstrap_addr)",
        f"{_OURS}:meet",
        "nothing comes from a server whose pages lie in another way",
        "that False means another try, and in the end an error for the request; "
        "`prefill_info_table`",
    ),
    Hook(
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager._validate_peer_state_layout",
        "around",
        "(self, registration_info)",
        f"{_OURS}:check_peer",
        "nothing is sent to a server whose pages lie in another way",
        "that a reason rejects the peer before anything is written; the fields of "
        "`KVArgsRegisterInfo`",
    ),
    Hook(
        f"{_PREFILL}.get_next_disagg_prefill_batch_to_run",
        "after",
        "(self, running_batch, last_batch, should_retry_storage_prefetch)",
        "sglang_jenga.serving.scheduling:note_round",
        "ranks compare what they hold, and embeddings end with their prompt",
        "that all ranks come here equally often; the plan's `batch_to_run`",
    ),
    Hook(
        f"{_DECODE}.get_next_disagg_decode_batch_to_run",
        "after",
        "(self, running_batch)",
        "sglang_jenga.serving.scheduling:note_round",
        "ranks compare what they hold",
        "that all ranks come here equally often; the plan's `batch_to_run`",
    ),
    Hook(
        f"{_DECODE}.process_decode_queue",
        "after",
        "(self)",
        f"{_OURS}:take_what_has_come",
        "transfers end while a retracted request waits for their pages",
        "whether it returns early while somebody is retracted",
    ),
    Hook(
        f"{_QUEUE}._uses_swa_tail_prealloc",
        "after",
        "(self)",
        f"{_OURS}:uses_window_tails",
        "windows are allocated with the rest",
        "what else asks it",
    ),
    Hook(
        f"{_QUEUE}._prealloc_reservation_fits",
        "around",
        "(self, full_tokens, swa_tokens, *, full_allocatable_tokens, swa_allocatable_tokens)",
        f"{_OURS}:reservation_fits",
        "room for a prompt that another server computes, all groups at once",
        "that `full_allocatable_tokens` is `available_size()` less what is kept for others; "
        "`_active_req_count`",
    ),
    Hook(
        f"{_QUEUE}._alloc_for_decode_prealloc",
        "around",
        "(self, allocator, **kwargs)",
        f"{_OURS}:alloc_for_prompt",
        "one allocation for such a prompt, from what the host knows",
        "the keyword arguments of `alloc_for_decode_prealloc`",
    ),
)
