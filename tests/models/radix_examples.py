"""What the examples of radix trees share: how an outcome and a lock are read."""

import pytest

PAGE_SIZES = pytest.mark.parametrize("tokens_per_page", [1, 4, 16])
FULL, WINDOW = 0, 1


def declined(outcome, pages):
    """Declined positions of each group, in small pages."""
    return [
        [pages[group_id].tolist().index(i) for ids in parts for i in ids.tolist()]
        for group_id, parts in enumerate(outcome.declined)
    ]


def used_map(node, group_id):
    """``U`` where a request needs a small page of the node's path, ``c`` where none does."""
    marks = ""
    while node.parent is not None:
        extent = node.extents[group_id]
        marks = ("U" if extent.pinned else "c") * extent.size + marks
        node = node.parent
    return marks
