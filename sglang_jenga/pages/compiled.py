"""How the loops over the books are compiled, and what they have in common.

All of them get the arrays of `layout` first, as `LargePages.group` hands them out, one by one: in a
tuple they would make each call take three times as long.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

from sglang_jenga.pages import layout

BOOKS = "int32[:,::1], int64[::1], int32[::1], int64"
"""Signature of the first arguments: pages, book, holder, base."""
IDS = "int64[::1]"
"""Small or large ids, or numbers of extents."""
TIMES = "int64[::1]"
"""By number of extent."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LAYOUT = {name: value for name, value in vars(layout).items() if name.isupper()}


def compiled(signature: str | None = None) -> Callable[[_Function], _Function]:
    """Compile; with a signature at once, so that no request waits for it.

    numba keeps the machine code on disk where it finds a place for it, in a file named after the
    function. It compiles again when the function's own file changes, and looks at no other. So the
    name says with which `layout` the code was made; and a compiled function must not call one of
    another file.
    """

    def compile_now(function: _Function) -> _Function:
        digest = zlib.crc32(repr(sorted(_LAYOUT.items())).encode())
        function.__qualname__ = f"{function.__name__}_{digest:08x}"
        arguments = () if signature is None else (signature,)
        machine_code: _Function
        try:
            machine_code = njit(*arguments, cache=True)(function)
        except RuntimeError:  # no folder that can be written to
            machine_code = njit(*arguments)(function)
        return machine_code

    return compile_now
