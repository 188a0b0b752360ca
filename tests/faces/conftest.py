"""SGLang with the plugin's hooks, configured, for every test of this folder."""

import pytest

from sglang_jenga.testing.context import configured


@pytest.fixture(scope="module", autouse=True)
def _sglang():
    with configured():
        from tests.faces.scheduler import hooked

        with hooked():
            yield
