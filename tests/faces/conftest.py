"""SGLang's configuration for every test of this folder."""

import pytest

from tests.faces.context import configured


@pytest.fixture(scope="module", autouse=True)
def _configuration():
    with configured():
        yield
