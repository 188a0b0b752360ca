"""The reference operators against independent loops, and where they may and may not appear."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
import torch

from sglang_jenga.cpu import sgl_kernel, state_operators
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import write_tiny_model

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sgl_kernel") is None, reason="needs SGLang"
)


def child(code: str, **env: str) -> str:
    """Run `code` in a new Python, as SGLang's processes are, and return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k != "SGLANG_USE_CPU_ENGINE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_new_slots_land_in_the_rows_and_columns_of_their_requests():
    generator = torch.Generator().manual_seed(0)
    table = torch.full((6, 20), -1, dtype=torch.int32)
    rows = torch.tensor([4, 0, 3])
    start = torch.tensor([2, 0, 7])
    end = torch.tensor([5, 9, 7])  # the last request gets nothing
    slots = torch.randperm(100, generator=generator)[:12]
    expected = [[-1] * 20 for _ in range(6)]
    queue = slots.tolist()
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        for column in range(first, last):
            expected[row][column] = queue.pop(0)

    sgl_kernel.assign_req_to_token_pool_cpu(rows, table, start, end, slots, table.shape[1])

    assert table.tolist() == expected
    assert not queue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_are_copied_in_every_buffer_as_if_all_were_read_first(dtype):
    buffers = [torch.arange(40).reshape(10, 4).to(dtype) + 50 * i for i in range(3)]
    buffers.append(torch.arange(20).reshape(10, 2).to(dtype))
    source, target = [1, 2, 3, 9], [2, 3, 1, 0]  # a cycle, and a plain move
    expected = []
    for buffer in buffers:
        rows = buffer.tolist()
        old = [list(row) for row in rows]
        for s, t in zip(source, target, strict=True):
            rows[t] = old[s]
        expected.append(rows)
    pointers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)
    strides = torch.tensor([b.stride(0) * b.element_size() for b in buffers])

    sgl_kernel.copy_all_layer_kv_cache_cpu(
        pointers, strides, torch.tensor(target), torch.tensor(source)
    )

    assert [buffer.tolist() for buffer in buffers] == expected


def test_without_the_cpu_engine_nothing_is_installed(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    before = list(sys.meta_path)

    sgl_kernel.install_if_needed()
    sgl_kernel.complete()

    assert sys.meta_path == before


def test_installing_twice_adds_one_finder_and_it_answers_one_name(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    sgl_kernel.install_if_needed()
    sgl_kernel.install_if_needed()

    assert sys.meta_path.count(sgl_kernel._FINDER) == 1
    # A real common_ops is found before.
    assert sys.meta_path.index(sgl_kernel._FINDER) > sys.meta_path.index(PathFinder)
    assert sgl_kernel._FINDER.find_spec("common_ops_of_somebody") is None


@needs_sglang
def test_sgl_kernel_imports_and_its_operators_work_in_a_process_of_sglang(launcher):
    """It has imported SGLang, as a spawned scheduler does, before it loaded any plugin."""
    table = launcher.run(
        """
import torch
from sgl_kernel import assign_req_to_token_pool_cpu, copy_all_layer_kv_cache_cpu
table = torch.zeros(2, 4, dtype=torch.int32)
one = torch.tensor([1])
assign_req_to_token_pool_cpu(one, table, one, one + 2, torch.tensor([7, 8]), 4)
answer = {"table": table.tolist()}
"""
    )["table"]

    assert table == [[0, 0, 0, 0], [0, 7, 8, 0]]


@needs_sglang
def test_an_operator_without_reference_resolves_and_names_itself_when_called(launcher):
    found = launcher.run(
        """
import torch
from sglang_jenga.cpu import sgl_kernel as operators
operators.complete()
try:
    torch.ops.sgl_kernel.fused_moe_router_cpu(torch.zeros(1))
except RuntimeError as error:
    said = str(error)
answer = {"said": said, "fast path": hasattr(torch.ops.sgl_kernel, "fused_qk_norm_cpu")}
"""
    )

    assert "fused_moe_router_cpu has no implementation here" in found["said"]
    # SGLang takes this fast path if the name exists; a name that only raises must not.
    assert not found["fast path"]


@needs_sglang
def test_a_real_operator_is_never_overridden():
    out = child(
        """
import torch
library = torch.library.Library("sgl_kernel", "FRAGMENT")
library.define("copy_all_layer_kv_cache_cpu(Tensor a, Tensor b, Tensor c, Tensor d) -> ()")
real = torch.ops.sgl_kernel.copy_all_layer_kv_cache_cpu
from sglang_jenga.cpu import sgl_kernel as operators
print("copy_all_layer_kv_cache_cpu" in operators.define_missing_operators())
print(torch.ops.sgl_kernel.copy_all_layer_kv_cache_cpu is real)
print(operators.define_missing_operators())
"""
    )

    assert out.split("\n") == ["False", "True", "[]"]


def test_every_name_is_either_implemented_or_only_resolved():
    implemented = sgl_kernel.IMPLEMENTED | state_operators.OPERATORS
    assert not set(implemented) & set(sgl_kernel.IMPORTED_ONLY)


@pytest.mark.slow
@needs_sglang
def test_a_stock_server_started_the_ordinary_way_answers(tmp_path):
    """Spawned scheduler and detokenizer, no jenga flag: the reference of every comparison."""
    model = write_tiny_model("llama", tmp_path / "llama")
    prompt = list(range(5, 90))

    with Server(model) as server:
        first, again = (server.generate([prompt], 8)[0] for _ in range(2))
        chat = server.post(
            "/v1/chat/completions",
            {"model": "x", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
        ).json()

    assert first.output_ids == again.output_ids
    assert (first.cached_tokens, again.cached_tokens) == (0, len(prompt) - 1)
    assert chat["choices"][0]["message"]["content"]
