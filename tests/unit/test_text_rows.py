"""Which new tokens of a step have an image to read, beside what SGLang makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sglang_jenga.serving import text_rows


def step(encoders: list[int], prefixes: list[int], new: list[int], *, decode: bool = False):
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decode),
        encoder_lens_cpu=encoders,
        extend_seq_lens_cpu=new,
        seq_lens=torch.tensor([a + b for a, b in zip(prefixes, new, strict=True)]),
    )


def refuse(*_: object) -> None:
    raise AssertionError("SGLang's own count is right for decode steps alone")


def test_text_behind_an_image_and_behind_a_cached_prefix_has_none():
    forward = step([68, 0, 68, 0], prefixes=[0, 40, 5, 0], new=[3, 2, 1, 2])

    found = text_rows.mask(refuse, None, forward)

    assert found.dtype == torch.bool
    assert found.tolist() == [[at] for at in (1, 1, 1, 0, 0, 1, 0, 0)]


def test_a_decode_step_is_left_to_sglang():
    forward = step([68, 0], prefixes=[9, 9], new=[1, 1], decode=True)

    assert text_rows.mask(lambda self, batch: (self, batch), "model", forward) == ("model", forward)
