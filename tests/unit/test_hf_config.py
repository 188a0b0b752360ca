"""Layer groups and stock layouts read from config.json, against sizes worked out by hand."""

import json
from pathlib import Path

import pytest

from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.stock import StockLayout, stock_pool, stock_requests, stock_tokens

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 1 << 30
POOL = 40 * GIB

# model: {group label: (layers, entry bytes)}; KV rows are heads * (K dim + V dim) * 2 bytes
GROUPS = {
    "llama-3.1-8b": {"full": (32, 32 * 8 * 256 * 2)},
    "gemma-2-9b": {"full": (21, 21 * 8 * 512 * 2), "window(4096)": (21, 21 * 8 * 512 * 2)},
    "gemma-3-12b": {"full": (8, 8 * 8 * 512 * 2), "window(1024)": (40, 40 * 8 * 512 * 2)},
    "gemma-3-27b": {
        "full": (10, 10 * 2 * 16 * 128 * 2),
        "window(1024)": (52, 52 * 2 * 16 * 128 * 2),
    },
    "gpt-oss-20b": {"full": (12, 12 * 8 * 128 * 2), "window(128)": (12, 12 * 8 * 128 * 2)},
    # SGLang's layers see one token more than the config says
    "ministral-8b": {"full": (9, 9 * 8 * 256 * 2), "window(32769)": (27, 27 * 8 * 256 * 2)},
    # conv: 3 columns of (4096 values + 2 * 16 * 128 keys) channels; delta-rule state in fp32
    "qwen3-next-80b-a3b": {
        "full": (12, 12 * 2 * 512 * 2),
        "state": (36, 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)),
    },
    # every layer has both; conv: 3 columns of (3072 + 2 * 1 * 256) channels
    "falcon-h1-7b": {
        "full": (44, 44 * 2 * 256 * 2),
        "state": (44, 44 * (3584 * 3 * 2 + 24 * 128 * 256 * 4)),
    },
    "nemotron-h-8b": {
        "full": (4, 4 * 8 * 256 * 2),
        "state": (24, 24 * (10240 * 3 * 2 + 128 * 64 * 128 * 4)),
    },
    "llama-3.2-11b-vision": {"full": (32, 32 * 8 * 256 * 2), "cross": (8, 8 * 8 * 256 * 2)},
    "lfm2-1.2b": {"full": (6, 6 * 8 * 128 * 2), "state": (10, 10 * 2048 * 2 * 2)},
    # Mamba-1: conv over the 8192 inner channels alone
    "jamba-1.5-mini": {
        "full": (4, 4 * 8 * 256 * 2),
        "state": (28, 28 * (8192 * 3 * 2 + 8192 * 16 * 4)),
    },
}
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"]}
NEMOTRON = {"architectures": ["NemotronHForCausalLM"]}
GEMMA4 = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "text_config": {
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
    },
}


def config_of(model):
    return json.loads((CONFIGS / f"{model}.json").read_text())


def geometry_of(model, **options):
    return read_geometry(config_of(model), **options)


def entries(geometry):
    return {group.label: (len(group.layer_ids), group.entry_bytes) for group in geometry.groups}


@pytest.mark.parametrize("model", GROUPS)
def test_groups_of_real_models_have_the_sizes_worked_out_by_hand(model):
    assert entries(geometry_of(model)) == GROUPS[model]


def test_every_fixture_is_in_the_table():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(GROUPS)


@pytest.mark.parametrize(
    ("model", "label", "first_layers"),
    [
        ("gemma-2-9b", "full", (1, 3, 5)),
        ("gemma-3-27b", "full", (5, 11, 17)),
        ("gpt-oss-20b", "full", (1, 3, 5)),
        ("ministral-8b", "full", (0, 4, 8)),
        ("qwen3-next-80b-a3b", "full", (3, 7, 11)),
        ("nemotron-h-8b", "full", (7, 18, 29)),
        ("lfm2-1.2b", "full", (2, 5, 8)),
        ("jamba-1.5-mini", "full", (4, 12, 20)),
    ],
)
def test_layer_ids_are_those_of_the_model(model, label, first_layers):
    (group,) = [group for group in geometry_of(model).groups if group.label == label]

    assert group.layer_ids[:3] == first_layers


def test_page_size_reaches_kv_groups_and_never_the_state():
    assert [g.tokens_per_page for g in geometry_of("qwen3-next-80b-a3b", page_size=64).groups] == [
        64,
        1,
    ]


@pytest.mark.parametrize(
    ("model", "tp", "entries_per_rank"),
    [
        ("gemma-3-27b", 4, (10 * 2 * 4 * 128 * 2, 52 * 2 * 4 * 128 * 2)),
        # 2 KV heads on 8 ranks: each keeps one. Conv and state heads are divided.
        ("qwen3-next-80b-a3b", 8, (12 * 512 * 2, 36 * (1024 * 3 * 2 + 4 * 128 * 128 * 4))),
        # one group of 256 keys on 4 ranks is repeated: (3072 + 2 * 4 * 256) / 4 channels
        ("falcon-h1-7b", 4, (44 * 256 * 2, 44 * (1280 * 3 * 2 + 6 * 128 * 256 * 4))),
    ],
)
def test_ranks_share_heads_as_sglang_does(model, tp, entries_per_rank):
    assert (
        tuple(group.entry_bytes for group in geometry_of(model, tp=tp).groups) == entries_per_rank
    )


@pytest.mark.parametrize(
    ("flags", "stored", "itemsize"),
    [
        ({}, "bfloat16", 2),
        ({}, "float32", 2),
        ({}, None, 2),
        ({"kv_cache_dtype": "fp8_e4m3"}, "bfloat16", 1),
        ({"kv_cache_dtype": "fp8_e5m2"}, "bfloat16", 1),
        ({"kv_cache_dtype": "bf16", "dtype": "float32"}, "float32", 2),
        ({"dtype": "float32"}, "bfloat16", 4),
        ({"dtype": "half"}, "float32", 2),
    ],
)
def test_entry_follows_the_kv_dtype_then_the_dtype(flags, stored, itemsize):
    geometry = read_geometry({**DENSE, "torch_dtype": stored}, **flags)

    assert geometry.groups[0].entry_bytes == 4 * 4 * 256 * itemsize


def test_states_do_not_follow_the_kv_dtype_but_mamba_ssm_dtype():
    config = config_of("nemotron-h-8b")

    assert (
        read_geometry(config, kv_cache_dtype="fp8_e4m3").groups[1]
        == read_geometry(config).groups[1]
    )
    half = read_geometry({**config, "mamba_ssm_dtype": "bfloat16"}).groups[1]
    assert half.entry_bytes == 24 * (10240 * 3 * 2 + 128 * 64 * 128 * 2)


def test_gemma_4_has_other_heads_in_full_layers():
    geometry = read_geometry(GEMMA4)

    assert entries(geometry) == {
        "full": (2, 2 * 2 * 1024 * 2),
        "window(1024)": (10, 10 * 4 * 512 * 2),
    }
    assert geometry.stock.token_bytes == 2 * 2 * 1024 * 2
    assert geometry.stock.window_token_bytes == 10 * 4 * 512 * 2


def test_layers_that_share_kv_have_rows_that_nobody_writes_as_in_sglang():
    config = {**GEMMA4, "text_config": {**GEMMA4["text_config"], "num_kv_shared_layers": 6}}

    assert read_geometry(config).groups == read_geometry(GEMMA4).groups


@pytest.mark.parametrize(
    ("architecture", "extra", "full_layers"),
    [
        ("Olmo2ForCausalLM", {}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("Olmo3ForCausalLM", {"model_type": "olmo3"}, (3, 7)),
        ("Cohere2ForCausalLM", {"model_type": "cohere2"}, (3, 7)),
        ("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG", "sliding_window": 64}, (3, 7)),
        ("Exaone4ForCausalLM", {"sliding_window": None}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("MistralForCausalLM", {"sliding_window": 4096}, (0, 1, 2, 3, 4, 5, 6, 7)),
        (
            "Gemma3ForCausalLM",
            {"sliding_window_pattern": 2, "model_type": "gemma3_text"},
            (1, 3, 5, 7),
        ),
        # SGLang stores in full what it has no code for.
        (
            "LlamaForCausalLM",
            {"layer_types": ["full_attention", "sliding_attention"] * 4, "sliding_window": 64},
            (0, 1, 2, 3, 4, 5, 6, 7),
        ),
        (
            "LlamaForCausalLM",
            {"is_hybrid_swa": True, "hybrid_layer_pattern": [1, 0] * 4, "sliding_window": 64},
            (1, 3, 5, 7),
        ),
        ("LlamaForCausalLM", {"sliding_window": 64}, (0, 1, 2, 3, 4, 5, 6, 7)),
        (
            "Qwen2ForCausalLM",
            {
                "layer_types": ["sliding_attention"] * 8,
                "sliding_window": 64,
                "use_sliding_window": False,
            },
            (0, 1, 2, 3, 4, 5, 6, 7),
        ),
    ],
)
def test_layer_mix_of_other_families(architecture, extra, full_layers):
    config = {**DENSE, "num_hidden_layers": 8, "architectures": [architecture], **extra}

    assert read_geometry(config).groups[0].layer_ids == full_layers


def test_windows_that_sglang_reads_as_full_attention_are_noted():
    with_window = {**DENSE, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}

    (note,) = read_geometry(with_window).notes
    assert "a window of 4096 tokens" in note and "stored in full" in note
    assert read_geometry({**with_window, "use_sliding_window": False}).notes == ()
    assert geometry_of("gemma-3-27b").notes == ()


@pytest.mark.parametrize("model", GROUPS)
def test_models_that_a_server_takes_are_not_refused(model):
    assert geometry_of(model).refused == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": None}, "config.json lacks architectures"),
        ({"num_attention_heads": None}, "config.json lacks num_attention_heads"),
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 4}, "got .'chunked_attention'."),
        (GEMMA3 | {"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers of 4"),
        (GEMMA3 | {"layer_types": ["linear_attention"] * 4}, "does not size its states"),
        (NEMOTRON | {"hybrid_override_pattern": "M*?"}, "must be of M.-E, got 'M.?.'"),
        (GEMMA3 | {"layer_types": ["mlp"] * 4}, "no layer of this config keeps KV or state"),
    ],
)
def test_configs_that_cannot_be_planned_say_why(change, words):
    with pytest.raises(ValueError, match=words):
        read_geometry({**DENSE, **change})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int3"}, "--dtype must be one of .*, got 'int3'"),
        ({"kv_cache_dtype": "fp32"}, "--kv-cache-dtype must be one of auto, .*, got 'fp32'"),
        ({"page_size": 0}, "--page-size must be above 0, got 0"),
        ({"tp": -1}, "--tp must be above 0, got -1"),
    ],
)
def test_bad_options_say_why(options, words):
    with pytest.raises(ValueError, match=words):
        read_geometry(DENSE, **options)


@pytest.mark.parametrize(
    ("change", "tp", "why"),
    [
        ({"num_key_value_heads": 6, "num_attention_heads": 12}, 4, "its 6 KV heads"),
        ({"num_key_value_heads": 1}, 16, "its 8 query heads"),
        ({"num_key_value_heads": 3, "num_attention_heads": 12}, 4, "its 3 KV heads"),
        ({"num_key_value_heads": 2}, 8, None),
        ({"multi_query": True}, 8, None),
    ],
)
def test_heads_must_be_shared_by_the_ranks_as_sglang_asserts(change, tp, why):
    geometry = read_geometry({**DENSE, **change}, tp=tp)

    assert geometry.refused == (
        f"--tp {tp} does not fit LlamaForCausalLM: {tp} ranks cannot share {why}" if why else ""
    )
    assert bool(geometry.groups) is (why is None)


def test_state_heads_must_be_shared_by_the_ranks():
    config = config_of("falcon-h1-7b") | {
        "num_attention_heads": 16,
        "mamba_n_heads": 12,
        "mamba_d_head": 256,
    }

    refused = read_geometry(config, tp=8).refused

    assert refused.endswith("8 ranks cannot share its 12 state heads")


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 8192}, 8192),
        ({"seq_length": 4096, "max_position_embeddings": 8192}, 4096),
        (
            {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "linear", "factor": 4}},
            32768,
        ),
        (
            {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "llama3", "factor": 4}},
            8192,
        ),
    ],
)
def test_context_is_derived_as_in_sglang(fields, tokens):
    assert read_geometry({**DENSE, **fields}).context_tokens == tokens


@pytest.mark.parametrize("model", ["gemma-2-9b", "gemma-3-12b", "gemma-3-27b", "ministral-8b"])
def test_stock_stores_every_layer_of_these_as_full(model):
    geometry = geometry_of(model)

    assert geometry.stock.token_bytes == sum(group.entry_bytes for group in geometry.groups)
    assert geometry.stock.window is None


def test_stock_window_pool_holds_four_fifths_of_the_tokens():
    stock = geometry_of("gpt-oss-20b", page_size=64).stock
    pool = stock_pool(stock, POOL)

    assert pool.full_tokens == int(POOL // (24576 * 1.8)) // 64 * 64
    assert pool.window_tokens == int(pool.full_tokens * 0.8) // 64 * 64
    # One request keeps ceil(127 / 64) pages of window and a partial one.
    assert stock_requests(stock, POOL, 256) == min(
        pool.full_tokens // 256, pool.window_tokens // 192
    )


def test_stock_window_pool_of_one_window_does_not_boot():
    layout = StockLayout(1024, 1024, 1000)

    assert stock_requests(layout, 1024 * 1.8 * 1249, 10) == 0
    assert stock_requests(layout, 1024 * 1.8 * 1300, 10) > 0


def test_stock_splits_bytes_between_states_and_kv():
    stock = geometry_of("qwen3-next-80b-a3b").stock
    state_bytes = 36 * 2146304
    pool = stock_pool(stock, POOL)

    assert pool.states == int(POOL * 0.9 / 1.9 / state_bytes) - 1
    assert pool.full_tokens == (POOL - (pool.states + 1) * state_bytes) // 24576
    assert stock.states_per_request == 5
    assert stock_requests(stock, POOL, 100) == pool.states // 5
    assert stock_tokens(stock, POOL, 32768) == 32768 * (pool.full_tokens // 32768)


def test_stock_pool_with_windows_alone_ignores_the_ratio():
    assert stock_pool(StockLayout(0, 1024, 128), 1 << 20) == (0, 1024, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_bytes": -1}, "token_bytes must be >= 0"),
        ({"token_bytes": 1, "window": 4}, "window and window_token_bytes go together"),
        ({"token_bytes": 1, "state_bytes": 4}, "state_bytes and states_per_request go together"),
    ],
)
def test_stock_layouts_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        StockLayout(**fields)


def test_stock_refuses_a_length_of_zero():
    with pytest.raises(ValueError, match="num_tokens must be positive, got 0"):
        stock_requests(StockLayout(1), 1, 0)
