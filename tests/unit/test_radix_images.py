"""Trees whose images lie before the text: hit as a whole, evicted as a whole, and after their text.

Text is group 0, images group 1; each small page is a large page alone.
"""

from itertools import accumulate

import numpy as np
import pytest

from sglang_jenga.layers.cross import CrossPolicy
from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import RecordingAllocator, plan_of

TEXT, IMAGE = 0, 1
CAT, DOG = [901] * 4, [902] * 6


def joined(*images):
    """All tokens of the images, and where each of them ends."""
    tokens = [token for image in images for token in image]
    return tokens, list(accumulate(len(image) for image in images if image))


class Trees:
    def __init__(self):
        self.allocator = RecordingAllocator(plan_of((1, 1), 64))
        self.trees = RadixTrees([FullPolicy(), CrossPolicy()], 1, self.allocator)

    def insert(self, image, text, *more):
        """``more``: images before the text, behind the first."""
        images, ends = joined(image, *more)
        need = [[len(text)], [len(images)]]
        pages = self.allocator.alloc(["request"], need)
        offers = [TokenPages(len(images), pages[TEXT]), TokenPages(0, pages[IMAGE])]
        return self.trees.insert(self.trees.root, None, np.array(images + text), offers, ends)

    def hit(self, image, text, *more):
        images, ends = joined(image, *more)
        return self.trees.match(None, np.array(images + text), ends).node

    @property
    def evicted(self):
        """Groups of the small pages that went, in order."""
        return [group_id for group_id, _ in self.allocator.evicted]


@pytest.fixture
def world():
    world = Trees()
    yield world
    world.trees.check()
    world.allocator.check(world.trees.extents())


def test_a_hit_is_none_or_past_the_image(world):
    world.insert(CAT, [1, 2, 3])

    assert world.hit(CAT, [1, 2, 9]).end == 6
    assert world.hit(CAT, [9]).end == 4
    assert world.hit([*CAT[:-1], 903], [1, 2]).end == 0
    assert world.trees.match(None, np.array(CAT[:3]), [4]).node.end == 0  # the key ends inside it


def test_an_image_of_another_length_or_a_text_of_its_name_is_another_key(world):
    world.insert(CAT, [1, 2, 3])

    assert world.hit(CAT[:3], [1]).end == 0
    assert world.hit([*CAT, 901], [1]).end == 0
    assert world.hit([], [*CAT, 1]).end == 0


def test_of_two_keys_that_part_inside_an_image_the_first_is_kept(world):
    world.insert(CAT, [1, 2, 3])

    other = world.insert(CAT[:3], [1, 2])

    assert other.node is world.trees.root and not any(other.declined)
    assert world.hit(CAT, [1, 2, 3]).end == 7


def test_the_same_image_once_more_is_declined_and_its_new_text_is_taken(world):
    world.insert(CAT, [1, 2, 3])

    again = world.insert(CAT, [1, 8, 9])

    assert [sum(ids.size for ids in parts) for parts in again.declined] == [1, 4]
    assert world.hit(CAT, [1, 8, 9]).end == 7


def test_text_goes_before_its_image_and_the_image_goes_whole(world):
    world.insert(CAT, [1, 2, 3])

    world.trees.evict_large(3)
    assert world.evicted == [TEXT] * 3
    world.trees.evict_large(1)
    assert world.evicted == [TEXT] * 3 + [IMAGE] * 4


def test_an_image_takes_what_hangs_on_it(world):
    world.insert(CAT, [1, 2, 3])
    world.insert(CAT, [1, 8, 9])

    assert world.trees.evict_small(IMAGE, 1) == 4
    assert sorted(world.evicted) == [TEXT] * 5 + [IMAGE] * 4
    assert not world.trees.nodes()


def test_of_several_images_a_hit_has_any_number_of_the_first_and_text_behind_all_alone(world):
    world.insert(CAT, [1, 2])

    assert world.hit(CAT, [1, 2], DOG).end == 4  # the text was computed without the dog
    world.insert(CAT, [1, 2], DOG)
    assert world.hit(CAT, [1, 9], DOG).end == 11
    assert world.hit(CAT, [1, 2]).end == 6
    assert world.hit(CAT, [1, 2], DOG, CAT).end == 10
    assert world.hit(CAT, [1, 2], [902] * 5).end == 4
    assert world.hit(DOG, [1, 2], CAT).end == 0


def test_two_images_of_one_name_are_not_one_of_both_lengths(world):
    world.insert(CAT + CAT, [1, 2])

    assert world.hit(CAT, [1, 2], CAT).end == 0
    assert world.insert(CAT, [1, 2], CAT).node is world.trees.root
    assert world.hit(CAT + CAT, [1, 2]).end == 10


def test_an_image_goes_before_the_one_that_it_lies_behind_and_takes_nobody_elses_text(world):
    world.insert(CAT, [1, 2])
    world.insert(CAT, [1, 2], DOG)
    lock = world.trees.lock(world.hit(CAT, [1, 2]))

    world.trees.evict_small(IMAGE, 1)

    assert world.hit(CAT, [1, 2], DOG).end == 4
    assert not world.trees.evict_small(IMAGE, 1)
    world.trees.unlock(lock)


def test_a_hit_on_text_makes_its_image_young(world):
    world.insert(CAT, [1])
    world.insert(DOG, [2])
    world.hit(CAT, [1])

    world.trees.evict_large(7)

    assert world.hit(CAT, [1]).end == 5
    assert world.hit(DOG, [2]).end == 0


def test_a_request_keeps_the_image_that_its_text_was_computed_from(world):
    node = world.insert(CAT, [1, 2]).node
    lock = world.trees.lock(node)

    assert not world.trees.evict_large(1) and not world.trees.evict_small(IMAGE, 1)
    world.trees.unlock(lock)
    assert world.trees.evict_small(IMAGE, 1) == 4


def test_what_is_shared_is_counted_in_the_group_that_has_it(world):
    node = world.insert(CAT, [1, 2]).node
    locks = [world.trees.lock(node) for _ in range(3)]

    assert list(world.trees.num_shared) == [2 * 2, 4 * 2]
    for lock in locks:
        world.trees.unlock(lock)
    assert list(world.trees.num_shared) == [0, 0]
