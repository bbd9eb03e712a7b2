import pytest
from serve_cases import saved

from megatron_spear.testing.serve import serve_in_thread


@pytest.fixture
def url():
    with serve_in_thread(saved(0)[1], deadline_s=20.0, update_deadline_s=20.0) as url:
        yield url
