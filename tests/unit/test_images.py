"""Names of a request's images, and what SGLang makes of a step in which some of them are hit."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    ScheduleBatch,
)
from sglang.srt.models.mllama import MllamaForConditionalGeneration

from sglang_jenga.serving import images
from sglang_jenga.serving.encoders import image_ends, missing_encoder

TOKENS = 6  # of an image: two tiles of three
MODEL = SimpleNamespace(vision_model=SimpleNamespace(num_patches=3), image_size=4)
CAT, DOG = torch.randn(2, 1, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def pictured(*pictures: torch.Tensor, shapes: list[int] | None = None) -> MultimodalInputs:
    count = len(pictures)
    item = MultimodalDataItem(
        modality=Modality.IMAGE,
        feature=torch.cat(pictures, dim=1),
        model_specific_data={
            "aspect_ratio_ids": torch.tensor([shapes or [1] * count]),
            "aspect_ratio_mask": torch.ones(1, count, 2, dtype=torch.int64),
        },
    )
    item.set_pad_value()
    return MultimodalInputs(mm_items=[item])


def names(inputs: MultimodalInputs) -> list[int]:
    padded = images.name_images(
        MllamaForConditionalGeneration.pad_input_ids, MODEL, array("q", [5, 6]), inputs
    )
    assert list(padded[inputs.num_image_tokens :]) == [5, 6]
    found = padded[: inputs.num_image_tokens : TOKENS]
    assert list(padded) == [*(name for name in found for _ in range(TOKENS)), 5, 6]
    return list(found)


def test_an_image_has_one_name_wherever_it_stands():
    (cat,), (dog,) = names(pictured(CAT)), names(pictured(DOG))

    assert cat != dog and min(cat, dog) > 1_000_000
    assert names(pictured(CAT, DOG, CAT)) == [cat, dog, cat]


def test_the_same_tiles_in_another_shape_are_another_image():
    assert names(pictured(CAT, shapes=[2])) != names(pictured(CAT, shapes=[3]))
    assert names(pictured(CAT, DOG, shapes=[2, 3]))[0] == names(pictured(CAT, shapes=[2]))[0]


def test_where_sglang_hashes_no_images_no_two_have_one_name():
    with envs.SGLANG_MM_SKIP_COMPUTE_HASH.override(True):
        found = names(pictured(CAT, CAT)) + names(pictured(CAT))

    assert len(set(found)) == 3


def request(inputs: MultimodalInputs | None, hit: int, text: int, logprobs_from: int = 0):
    end = text if inputs is None else text + inputs.num_image_tokens
    return SimpleNamespace(
        multimodal_inputs=inputs,
        prefix_len=hit,
        extend_len=end - hit,
        logprob_start_len=logprobs_from,
        end=end,
    )


def sorted_step(reqs: list[SimpleNamespace]) -> ScheduleBatch:
    """What SGLang makes of it; slots and tokens are numbered from 100 on."""
    batch = ScheduleBatch(reqs=reqs)
    batch.device = "cpu"
    batch.forward_mode = SimpleNamespace(is_decode=lambda: False)
    batch.extend_lens = [req.extend_len for req in reqs]
    batch.prefix_lens = [req.prefix_len for req in reqs]
    batch.extend_num_tokens = sum(batch.extend_lens)
    batch.out_cache_loc = torch.arange(100, 100 + batch.extend_num_tokens)
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    batch.extend_input_logprob_token_ids = None
    numbers = iter(range(100, 1000))
    tokens = [array("q", [next(numbers) for _ in range(req.extend_len)]) for req in reqs]
    images.sort_step(
        ScheduleBatch.prepare_encoder_info_extend, batch, tokens, [req.end for req in reqs]
    )
    return batch


def test_a_hit_between_two_images_leaves_the_images_behind_it_and_all_text():
    behind_one, all_hit, text_only = pictured(CAT, DOG), pictured(CAT, DOG), None
    names(behind_one), names(all_hit)
    reqs = [
        request(behind_one, TOKENS, 3),
        request(all_hit, 2 * TOKENS + 1, 3),
        request(text_only, 1, 4),
    ]

    batch = sorted_step(reqs)

    assert batch.reqs is reqs and reqs[0].prefix_len == TOKENS
    assert batch.encoder_lens_cpu == batch.encoder_lens.tolist() == [2 * TOKENS, 2 * TOKENS, 0]
    assert batch.encoder_cached == [False, True, True]
    assert batch.encoder_out_cache_loc.tolist() == list(range(100, 100 + TOKENS))
    text = list(range(100 + TOKENS, 100 + TOKENS + 3 + 2 + 3))
    assert batch.out_cache_loc.tolist() == batch.prefill_input_ids_cpu.tolist() == text
    assert (batch.prefix_lens, batch.extend_lens) == ([0, 1, 1], [3, 2, 3])
    assert batch.seq_lens.tolist() == [3, 3, 4]
    assert [req.logprob_start_len for req in reqs] == [2 * TOKENS, 2 * TOKENS, 0]


def test_only_the_images_behind_a_hit_are_encoded():
    some, lacks_all = pictured(CAT, DOG, CAT, shapes=[1, 2, 3]), pictured(CAT)
    names(some), names(lacks_all)
    batch = sorted_step([request(some, TOKENS, 2), request(lacks_all, 0, 2)])
    forward = SimpleNamespace(
        forward_mode=batch.forward_mode,
        encoder_cached=batch.encoder_cached,
        encoder_lens=batch.encoder_lens,
        mm_inputs=batch.multimodal_inputs,
        out_cache_loc=batch.out_cache_loc,
    )

    pixels, shapes, _, lens = images.images_to_encode(
        MllamaForConditionalGeneration._batch_image_inputs, MODEL, forward
    )

    assert lens == [2 * TOKENS, TOKENS]
    assert torch.equal(pixels[0], torch.cat([DOG[0], CAT[0]]))
    assert torch.equal(pixels[1, :1], CAT[0])
    assert shapes.tolist() == [[2, 3], [1, 1]]
    assert some.mm_items[0].feature.shape[1] == 3  # for when it is computed again


def test_what_is_missing_of_an_encoder_is_counted_behind_the_hit():
    inputs = pictured(CAT, DOG)
    names(inputs)

    assert image_ends(request(inputs, 0, 1)) == (TOKENS, 2 * TOKENS)
    missing = [missing_encoder(request(inputs, hit, 3)) for hit in (0, TOKENS, 12, 14)]
    assert missing == [2 * TOKENS, TOKENS, 0, 0]


def test_images_that_a_sessions_later_turn_has_added_are_in_no_piece_of_their_own():
    first, later = pictured(CAT), pictured(DOG)
    names(first), names(later)
    first.merge(later)  # SGLang adds up the images, not their tokens

    assert image_ends(request(first, 0, 1)) == (TOKENS,)


def test_a_later_turn_whose_images_sglang_names_together_can_be_added_too():
    first, later = pictured(CAT), pictured(DOG)
    later.mm_items *= 2  # two tensors: no names of ours
    names(first)
    images.name_images(
        MllamaForConditionalGeneration.pad_input_ids, MODEL, array("q", [5, 6]), later
    )

    first.merge(later)  # SGLang adds lists here, and stops at None

    assert first.image_pad_len[0] == TOKENS
