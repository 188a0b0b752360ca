"""What may be read of SGLang's tensors without waiting for the device."""

from __future__ import annotations

import ast
from pathlib import Path

import sglang_jenga

PACKAGE = Path(sglang_jenga.__file__).resolve().parent


def test_only_tensors_that_sglang_calls_cpu_are_read_as_host_arrays():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "host_array":
                (read,) = node.args
                assert isinstance(read, ast.Attribute) and read.attr.endswith("_cpu"), path
                seen += 1
    assert seen


def test_a_host_array_is_a_view():
    import torch

    from sglang_jenga.serving.host_arrays import host_array

    lengths_cpu = torch.tensor([3, 4])
    view = host_array(lengths_cpu)
    lengths_cpu[0] = 7
    assert view.tolist() == [7, 4]
