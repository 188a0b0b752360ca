"""Machine code that numba keeps on disk is never of an older source."""

import subprocess
import sys

import pytest
from numba.core.dispatcher import Dispatcher

from sglang_jenga.pages import books, turns

MODULES = pytest.mark.parametrize("module", [books, turns], ids=lambda module: module.__name__)

PROGRAM = """
import sys
from sglang_jenga.pages import layout
layout.K = int(sys.argv[1])
import loops
print(loops.place())
"""
LOOPS = """
from sglang_jenga.pages.compiled import compiled
from sglang_jenga.pages.layout import K

@compiled("int64()")
def place():
    return K
"""


def functions(module):
    return [value for value in vars(module).values() if isinstance(value, Dispatcher)]


@MODULES
def test_a_compiled_function_calls_none_of_another_file(module):
    assert functions(module)
    assert {function.py_func.__module__ for function in functions(module)} == {module.__name__}


def test_another_layout_is_compiled_anew(tmp_path):
    (tmp_path / "loops.py").write_text(LOOPS)

    def place(value):
        command = [sys.executable, "-c", PROGRAM, str(value)]
        # The program's folder is the first place where its imports are looked for.
        return int(subprocess.check_output(command, cwd=tmp_path, text=True))

    assert [place(11), place(12), place(11)] == [11, 12, 11]
    assert len(list((tmp_path / "__pycache__").glob("*.nbi"))) == 2
