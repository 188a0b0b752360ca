"""The command line: what it prints, what it refuses, and what it must not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_jenga import __version__
from sglang_jenga.plan import cli
from sglang_jenga.plan.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parents[1] / "configs"
GEMMA = str(CONFIGS / "gemma-3-27b.json")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sglang_jenga.plan.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def planned(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_prints_groups_capacity_and_stock():
    done = run("plan", GEMMA, "--lengths", "8k")

    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "Gemma3ForConditionalGeneration, page size 1, one of 1 rank(s)"
    assert lines[1] == "served: yes"
    assert "pool 40.00 GiB: 20164 large pages of 2.03 MiB" in lines
    assert "full 10 80.00 KiB 1 80.00 KiB 26 0.00 %" in lines
    assert "window(1024) 52 416.00 KiB 1 416.00 KiB 5 0.00 %" in lines
    assert "8192 38 311296 38.8 10 3.80x" in lines
    assert "stock: all 62 attention layers stored for every token" in lines


def test_json_holds_the_same_numbers():
    done = run("plan", GEMMA, "--json", "--lengths", "8k", "--page-size", "16", "--tp", "2")
    plan = json.loads(done.stdout)

    assert plan["large_page_bytes"] == 260 * 4096 * 16
    assert [group["smalls_per_large"] for group in plan["groups"]] == [26, 5]
    assert [group["tokens_per_page"] for group in plan["groups"]] == [16, 16]
    (row,) = plan["capacity"]
    assert row["tokens"] == 8192 * row["requests"]
    assert row["ratio"] == row["requests"] / row["stock"]


def test_the_sample_in_the_documents_is_what_is_printed(capsys):
    page = (ROOT / "docs" / "operations.md").read_text()
    command, sample = page.split("$ sglang-jenga ", 1)[1].split("```")[0].split("\n", 1)

    assert main([word.replace("tests/configs", str(CONFIGS)) for word in command.split()]) == 0
    assert capsys.readouterr().out == sample


def test_a_folder_with_a_config_is_enough(tmp_path, capsys):
    (tmp_path / "config.json").write_text(Path(GEMMA).read_text())

    assert planned(capsys, str(tmp_path))["architecture"] == "Gemma3ForConditionalGeneration"


REFUSED = {
    "lfm2-1.2b": "--page-size 64: without tracking, a cached state is that of one very token",
    "llama-3.2-11b-vision": "--page-size 64: SGLang looks for a row's last page without its",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_fixture_prints_what_it_holds_or_why_it_is_not_served(path, capsys):
    assert main(["plan", str(path), "--page-size", "64"]) == 0
    out = capsys.readouterr().out
    if path.stem in REFUSED:
        assert "served: no, --memory-backend jenga does not" in out
        assert REFUSED[path.stem] in out
        assert "tokens/request" not in out
    else:
        assert "served: yes" in out
        assert "null pages:" in out and "ratio" in out


def test_a_refusal_is_json_too(capsys):
    plan = planned(capsys, str(CONFIGS / "hard" / "deepseek_v4_refused.json"))

    assert plan["served"] is False
    assert "it caches more per token than K and V" in plan["refused"]
    assert plan.keys() == {"architecture", "served", "refused"}


def test_lengths_beyond_the_context_are_left_out_and_said(capsys):
    gemma2 = str(CONFIGS / "gemma-2-9b.json")

    plan = planned(capsys, gemma2)
    assert [row["num_tokens"] for row in plan["capacity"]] == [1024, 8192]
    assert "no request is longer than the model's context of 8192 tokens" in plan["notes"]
    plan = planned(capsys, gemma2, "--lengths", "32k")
    assert [row["num_tokens"] for row in plan["capacity"]] == [8192]


def test_a_model_of_the_hub_is_answered_with_what_to_download(capsys):
    assert main(["plan", "google/gemma-3-27b-it"]) == 2
    err = capsys.readouterr().err
    assert "hf download google/gemma-3-27b-it --include '*config.json'" in err
    assert err.count("\n") == 1


def test_a_model_of_the_hub_may_have_no_owner(capsys):
    assert main(["plan", "gpt2"]) == 2
    assert "hf download gpt2 --include '*config.json'" in capsys.readouterr().err


@pytest.mark.parametrize("page_size", [7, 48, 96, 512])
def test_pages_that_do_not_fit_where_states_are_tracked_are_refused(page_size, capsys):
    qwen = str(CONFIGS / "qwen3-next-80b-a3b.json")

    plan = planned(capsys, qwen, "--page-size", str(page_size))

    assert plan["refused"] == (
        f"--memory-backend jenga does not work with --page-size {page_size}: states are tracked "
        "every 256 tokens, and that must be whole pages; drop --page-size or --memory-backend"
    )
    assert planned(capsys, qwen, "--page-size", "64")["served"] is True


def architecture_of(tmp_path, name, **fields):
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "architectures": [name], **fields}))
    return str(path)


def test_a_model_that_nobody_has_code_for_has_no_capacity(tmp_path, capsys):
    plan = planned(capsys, architecture_of(tmp_path, "SinkGemmaForCausalLM"))

    assert plan["refused"] == (
        "--memory-backend jenga does not serve SinkGemmaForCausalLM: SGLang 0.5.23 has no code "
        "for it; drop --memory-backend"
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("MinistralForCausalLM", {}),  # with a row
        ("DiffLlamaForCausalLM", {}),
        ("TheirsForCausalLM", {"auto_map": {"AutoModel": "modeling.Theirs"}}),
    ],
)
def test_what_only_the_fallback_may_run_is_said(tmp_path, capsys, name, fields):
    plan = planned(capsys, architecture_of(tmp_path, name, **fields))

    assert plan["served"] is True
    assert any("if its Transformers fallback takes it" in note for note in plan["notes"])


def test_what_sglang_has_code_for_needs_no_note(capsys):
    assert planned(capsys, str(CONFIGS / "llama-3.1-8b.json"))["notes"] == []


def test_the_package_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "sglang_jenga", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.stdout, done.returncode) == (f"sglang-jenga {__version__}\n", 0)


def test_the_version_is_told():
    assert run("--version").stdout == f"sglang-jenga {__version__}\n"


@pytest.mark.parametrize("command", [(), ("plan",)])
def test_help_has_an_example(command):
    text = run(*command, "--help").stdout

    assert "examples:\n" in text
    assert "sglang-jenga plan" in text.split("examples:\n")[1]


def test_examples_of_the_help_are_command_lines_that_parse(capsys):
    lines = [line.split() for line in cli._PLAN_EXAMPLES.splitlines() if "sglang-jenga" in line]
    assert len(lines) >= 3
    for _, *arguments in lines:
        cli._parser().parse_args(arguments)


def test_a_reader_who_leaves_early_is_no_error():
    # `true` has ended long before Python is up.
    command = f"{sys.executable} -m sglang_jenga.plan.cli plan {GEMMA} --json | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("1k,8K,32k", [1024, 8192, 32768]), ("100", [100]), ("1m", [1 << 20])],
)
def test_lengths_take_units(text, lengths, tmp_path, capsys):
    config = json.loads(Path(GEMMA).read_text())
    config["text_config"]["max_position_embeddings"] = 1 << 20
    (tmp_path / "config.json").write_text(json.dumps(config))

    plan = planned(capsys, str(tmp_path), "--lengths", text)

    assert [row["num_tokens"] for row in plan["capacity"]] == lengths


def test_fp8_halves_the_entries(capsys):
    plan = planned(capsys, GEMMA, "--kv-cache-dtype", "fp8_e4m3", "--pool-gib", "0.5")

    assert plan["groups"][0]["entry_bytes"] == 40 * 1024


def test_what_a_request_holds_besides_tokens_is_said(capsys):
    assert main(["plan", str(CONFIGS / "falcon-h1-7b.json")]) == 0
    assert "pins 2 state slot(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "no/such/model"], "no config.json at no/such/model"),
        (["plan", str(CONFIGS)], "no config.json at"),
        (["plan", GEMMA, "--kv-cache-dtype", "int3"], "got 'int3'"),
        (
            ["plan", GEMMA, "--page-size", "0"],
            "--page-size: must be a whole number above 0, got '0'",
        ),
        (["plan", GEMMA, "--page-size", "many"], "--page-size: must be a whole number above 0"),
        (["plan", GEMMA, "--tp", "-1"], "argument --tp: "),
        *(
            (
                ["plan", GEMMA, "--pool-gib", size],
                "--pool-gib: must be a number above 0 and at most",
            )
            for size in ("0", "-1", "nan", "inf", "1e30", "much")
        ),
        (["plan", GEMMA, "--pool-gib", "0.001"], "holds 2 large pages of 416.09 KiB, one request"),
        (["plan", GEMMA, "--lengths", "8q"], "must look like 1k,8k,32k, got '8q'"),
        (["plan", GEMMA, "--lengths", "0"], "got '0'"),
        ([], "the following arguments are required"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "config.json lacks architectures"),
        ("{", "is not JSON"),
        ("\ufeff{}", "it begins with a byte order mark"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_bad_configs_are_one_line_and_exit_2(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)

    done = run("plan", str(tmp_path))

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_cli_imports_neither_torch_nor_sglang():
    code = (
        "import sys, sglang_jenga.plan.cli; "
        "print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.strip() == "[]", done.stderr
