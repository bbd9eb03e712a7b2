"""Tests against real rollout servers; ``pytest tests/engines`` where their environments are built.

They are no part of tools/test.sh: a server takes 20 s to start, on a busy machine minutes.
"""

import pytest

from megatron_spear.testing.real_engines import START_LIMIT_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "engines":
            item.add_marker(pytest.mark.real_engine)
            item.add_marker(pytest.mark.timeout(2 * START_LIMIT_S))
