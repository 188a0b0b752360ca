"""SGLang's scheduler with pictures before texts: cross attention beside self-attention."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sglang_jenga.testing.context import Settings
from tests.conftest import tries
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

# Tokens of pictures: of different lengths, one of two pictures, two with one name.
PICTURES = ([], [901] * 9, [902] * 14, [903] * 5 + [904] * 5, [905] * 30, [902] * 6)
SHAPES = [Shape(full=full, cross_k=cross) for full, cross in ((1, 1), (1, 4), (3, 4), (4, 1))]


def settings(**changes: Any) -> Settings:
    """SGLang cuts no prompt of a model with an encoder."""
    return Settings(chunk=None, **changes)


def ask(rig: Rig, which: int, text: list[int], **options: Any) -> str:
    picture = PICTURES[which]
    return rig.submit(picture + text, encoder=len(picture), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.full} {shape.cross_k}")
def test_a_picture_is_hit_as_a_whole_and_takes_pages_of_cross_attention_alone(shape):
    with Rig(shape, settings()) as rig:
        core = rig.pools.allocator.core
        ask(rig, 1, [0, 1, 2], max_new=4)
        rig.run()
        assert core.num_cached == [3 + 4 - 1, 9]

        again = ask(rig, 1, [0, 1, 1], max_new=1)
        other = ask(rig, 1, [2, 1, 1], max_new=1)
        alien = ask(rig, 2, [0, 1, 2], max_new=1)
        text = ask(rig, 0, [0, 1, 2], max_new=1)
        rig.run()

        assert [rig.ended(rid).hit for rid in (again, other, alien, text)] == [11, 9, 0, 0]
        rig.check_nothing_lost()


def test_two_pictures_of_one_name_do_not_share_and_the_second_is_not_kept():
    with Rig(SHAPES[2], settings()) as rig:
        for which, hit in ((2, 0), (5, 0), (5, 0), (2, 16)):
            rid = ask(rig, which, [0, 1, 2], max_new=2)
            rig.run()
            assert rig.ended(rid).hit == hit
        rig.check_nothing_lost()


def test_text_that_spells_a_picture_does_not_read_it():
    with Rig(SHAPES[1], settings()) as rig:
        ask(rig, 1, [0, 1, 2], max_new=2)
        rig.run()

        spelt = rig.submit(PICTURES[1] + [0, 1, 2], max_new=2)
        rig.run()

        assert rig.ended(spelt).hit == 0
        rig.check_nothing_lost()


def test_requests_with_one_new_picture_in_one_batch_end_up_with_one_copy():
    with Rig(SHAPES[1], settings()) as rig:
        core = rig.pools.allocator.core
        for at in range(4):
            ask(rig, 1, [0, at % 3, 1], max_new=6)
        rig.turn(3)
        assert core.num_used[1] == 9
        rig.run()
        rig.check_nothing_lost()


# Not without a cache and with known lengths: SGLang forecasts that a picture frees as much as text.
@pytest.mark.parametrize(("radix", "known_length"), [(True, True), (True, False), (False, False)])
def test_admission_counts_a_picture_once_and_in_its_own_pages(radix, known_length):
    """A picture takes 10 large pages, text and answer as many: three requests nearly fill the
    pool, where SGLang keeps a few tokens free."""
    shape = Shape(full=1, cross_k=7, num_large=3 * (10 + 10) + 5)
    with Rig(shape, settings(radix=radix)) as rig:
        for at in range(4):
            rig.submit(
                [910 + at] * 70 + [0, 1, 2, at % 3],
                max_new=6,
                encoder=70,
                known_length=known_length,
            )
        rig.turn(4)
        running = len(rig.scheduler.running_batch.reqs)
        rig.run()

        assert running == 3
        assert sum(rig.ended(rid).retractions for rid in rig.asked) == 0


def test_a_request_that_is_alone_is_served_if_its_picture_and_text_fit_an_empty_pool():
    shape = Shape(full=1, cross_k=5, num_large=1 + 6 + 20)
    with Rig(shape, settings()) as rig:
        # The null pages take one large page, 30 tokens of a picture 6, and 10 of text as many.
        fits = ask(rig, 4, answer([0], 10), max_new=100)
        rig.run()

        ended = rig.ended(fits)
        assert (ended.reason, len(ended.tokens)) == ("length", 10)
        rig.check_nothing_lost()


class Client:
    """Sends anything at any time, drawn from a seed."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.draw = rig, random.Random(seed)
        self.sent: list[tuple[str, int, list[int], int]] = []

    def act(self) -> None:
        draw, rig = self.draw, self.rig
        chosen = draw.random()
        if chosen < 0.3 or not self.sent:
            self.submit(draw.randrange(len(PICTURES)), [draw.randrange(3) for _ in range(3)])
        elif chosen < 0.5:
            _, which, text, max_new = draw.choice(self.sent)
            said = answer(PICTURES[which] + text, max_new)
            self.submit(which, text + said[: draw.randrange(max_new + 1)])
        elif chosen < 0.8:
            rig.turn(draw.randrange(1, 6))
        elif chosen < 0.87:
            rid = draw.choice(self.sent)[0]
            rig.abort(rid)
            rig.fails |= {other for other in rig.asked if other.startswith(rid)}  # as SGLang has it
        elif chosen < 0.92:
            rig.retract()
        elif chosen < 0.95 and not rig.paused:
            rig.pause(draw.choice(["retract", "in_place"]))
            rig.turn(2)
            rig.resume()
        elif chosen < 0.97:
            rig.flush()
        else:
            rig.run()

    def submit(self, which: int, text: list[int]) -> None:
        own = answer([self.draw.randrange(3)], self.draw.choice([0, 2, 9, 25]))
        text, max_new = (text + own)[:60], self.draw.randrange(1, 20)
        rid = ask(
            self.rig,
            which,
            text,
            max_new=max_new,
            known_length=self.draw.random() < 0.5,
            cached=self.draw.random() < 0.8,
        )
        self.sent.append((rid, which, text, max_new))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.full} {shape.cross_k}")
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
def test_whatever_clients_do_all_read_their_own_and_nothing_is_lost(shape, overlap, radix):
    retracted = 0
    for seed in range(tries(4)):
        pool = shape._replace(num_large=140 // min(shape.full, shape.cross_k) + 4)
        with Rig(pool, settings(overlap=overlap, radix=radix)) as rig:
            client = Client(rig, seed)
            for _ in range(60):
                client.act()
            rig.run()
            retracted += sum(rig.ended(rid).retractions for rid in rig.asked)
            rig.check_nothing_lost()
    assert retracted > 0
