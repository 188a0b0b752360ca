"""What one request may ask for that is not served: refused with SGLang's own status 400.

Flags are refused when the server starts (`validate`); these any client can send to a server that
serves everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_jenga.boot import flags

NO_BEAMS = (
    "Beam search is not supported with --memory-backend jenga: beams share pages of an answer "
    "and leave them one by one, which no request's row names."
)


def validate_beams(
    original: Callable[..., str | None], self: Any, req: Any, recv_req: Any
) -> str | None:
    """SGLang asks before it attaches a group of beams to a request, and sends the reason back.

    A beam is a row of a batch with no request behind it. SGLang frees its tokens by their slots,
    read from the device; here they are freed by request and position, and the host knows both.
    SGLang itself refuses beams where it has more than one kind of layer to look after.
    """
    return NO_BEAMS if flags.is_on() else original(self, req, recv_req)
