"""One world of one rank for all policy tests of a process."""

from collections.abc import Iterator

import pytest

from megatron_spear.config.schema import PolicySection
from megatron_spear.policy import parallel


@pytest.fixture(scope="session")
def ctx() -> Iterator[parallel.ParallelContext]:
    yield parallel.initialize(PolicySection(), seed=0, timeout_s=60)
    parallel.destroy()
