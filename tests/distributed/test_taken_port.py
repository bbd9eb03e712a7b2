"""The port at which the ranks are to meet is somebody else's: all end, and say why."""

import os
import socket
from pathlib import Path

from megatron_spear.testing.faults import ranks_that_may_fail


def meet(folder: Path, port: int) -> None:
    """As without torchrun, whose agent would hold the port already."""
    from megatron_spear.config.schema import PolicySection
    from megatron_spear.policy import parallel
    from megatron_spear.trainer.watch import COLLECTIVE_LIMIT_S, watched

    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ["MASTER_PORT"] = str(port)
    with watched(15.0, folder):
        parallel.initialize(PolicySection(), seed=0, timeout_s=COLLECTIVE_LIMIT_S)


def test_a_taken_meeting_point_is_told_on_every_rank(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ranks_that_may_fail(meet, 2, tmp_path / "log", tmp_path / "hb", port) as ranks:
            for rank in ranks:
                assert rank.wait(90.0) in (1, 70), rank.err
    own = ranks[0].err
    assert f"ConfigError: the ranks cannot meet at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in own
    assert "address already in use" in own.lower() or "EADDRINUSE" in own
    told = ranks[1].err
    assert "has ended: ConfigError: the ranks cannot meet" in told, told
