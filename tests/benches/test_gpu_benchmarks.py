"""What a GPU machine would run, as far as it goes without one: reports and the bundle."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import stage, warm
from benchmarks.gpu.bench_attention import cells
from benchmarks.gpu.timing import Column, Report

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (Column("name", "name"), Column("time", "time, us", "{:.1f}"))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def test_a_report_on_disk_has_every_row_as_soon_as_it_is_measured(tmp_path):
    paths = {"json_path": str(tmp_path / "r.json"), "markdown_path": str(tmp_path / "r.md")}
    report = Report("title", COLUMNS, "python -m it", "A card, driver 1", **paths)

    report.add(name="a", time=1.26)
    report.note("b does not fit")

    assert (tmp_path / "r.md").read_text() == (
        "    python -m it\n\nA card, driver 1.\n\n"
        "| name | time, us |\n|---|---|\n| a | 1.3 |\n\n* b does not fit\n"
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["rows"] == [{"name": "a", "time": 1.26}]
    report.add(name="c")
    assert (tmp_path / "r.md").read_text().count("| c | - |") == 1


@NO_GPU
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_attention", "bench_page_ops", "bench_parity", "suite"])
def test_without_a_gpu_a_benchmark_says_so_in_one_line(name):
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert run.returncode == 2
    assert run.stdout + run.stderr == "no CUDA device here: nothing to measure\n"


def test_the_first_cells_have_a_bit_of_everything():
    first = list(cells())[:36]

    assert {cell.page_size for cell in first} == {1, 16, 64}
    assert {cell.num_new == 1 for cell in first} == {True, False}
    assert len({cell.group for cell in first}) == 6


def test_every_kernel_that_is_compiled_ahead_is_compiled_once():
    assert len(warm.jobs()) == len(set(warm.jobs()))
    # Heads of 64, 128 and 256, with windows and without, by few and by many query heads.
    assert len(warm.jobs()) == len(warm.KERNELS) * len(warm.STEPS) * 6


@pytest.mark.parametrize(
    ("package", "path", "taken"),
    [
        ("sglang", "sglang/srt/server_args.py", True),
        ("sglang", "sglang/multimodal_gen/runtime/server.py", False),
        ("sglang", "sglang/srt/rust_extensions/_server.cpython-312-x86_64-linux-gnu.so", False),
        ("sglang", "sglang/srt/rust_extensions/loader.py", True),
        ("sglang", "sglang-0.5.23.dist-info/METADATA", True),
        ("flashinfer-python", "flashinfer/data/csrc/batch_decode.cu", True),
        ("flashinfer-python", "flashinfer/data/csrc/fused_moe/gemm.cu", False),
        ("flashinfer-python", "flashinfer/data/cutlass/include/cutlass/cutlass.h", True),
        ("flashinfer-python", "flashinfer/fused_moe/backends/kernel.cu", False),
        ("flashinfer-python", "flashinfer/fused_moe/backends/kernel.py", True),
    ],
)
def test_the_bundle_takes_what_attention_needs(package, path, taken):
    (found,) = (p for p in stage.WHEELS if p.requirement.startswith(f"{package}=="))

    assert found.takes(path) == taken


def test_the_record_of_a_package_lists_what_was_taken(tmp_path):
    """By it xgrammar finds its library."""
    package = stage.Package("owner", r"owner/big/")
    wheel, site = tmp_path / "owner-1-py3-none-any.whl", tmp_path / "site"
    record = 'owner/a.so,sha256=x,1\n"owner/big/b,c.so",sha256=y,2\nowner-1.dist-info/RECORD,,\n'
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("owner/a.so", "owner/big/b,c.so"):
            archive.writestr(name, "")
        archive.writestr("owner-1.dist-info/RECORD", record)

    stage.unpack(wheel, package, site)

    lines = (site / "owner-1.dist-info/RECORD").read_text().splitlines()
    assert lines == ["owner/a.so,sha256=x,1", "owner-1.dist-info/RECORD,,"]
    assert {p.name for p in site.rglob("*") if p.is_file()} == {"a.so", "RECORD"}


TAKEN = """
import torch
import common_ops
print(torch.ops.sgl_kernel.moe_align_block_size.default)
import cutedsl_dual_gemm as m
print(m.MAX_DUAL_GEMM_DECODE_TOKENS, m.DualGemmQuantMode.UNQUANT)
print(m.DualGemmQuantMode.DYNAMIC_PER_TOKEN, m.DualGemmQuantMode.STATIC_PER_TENSOR)
print(m.can_use_dual_gemm(1, 2, 3, m.DualGemmQuantMode.UNQUANT))
"""


@pytest.mark.slow
def test_what_stands_in_has_the_names_that_sglang_takes_from_it():
    """With this environment's PyTorch, in a process whose `sgl_kernel` has no such operator yet."""
    assert set(stage.STAND_INS) == {"common_ops.py", "cutedsl_dual_gemm.py"}
    run = subprocess.run(
        [sys.executable, "-c", TAKEN],
        capture_output=True,
        text=True,
        cwd=ROOT / "benchmarks" / "gpu" / "stand_ins",
    )

    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "moe_align_block_size" in lines[0]
    assert lines[-1] == "False"


def test_a_version_that_another_package_pins_is_read_from_its_metadata(tmp_path):
    wheel = tmp_path / "owner-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "owner-1.dist-info/METADATA",
            "Name: owner\nRequires-Dist: inner==2.50.4; python_version > '3'\nRequires-Dist: b\n",
        )

    assert stage.pinned_version("inner", wheel) == "inner==2.50.4"
