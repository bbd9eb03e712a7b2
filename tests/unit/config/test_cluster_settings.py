"""Settings of the machines: times as Slurm writes them, and numbers that follow from others."""

from pathlib import Path

import pytest

from megatron_spear.config.cluster import ClusterSection, SlurmSection
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("02:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert SlurmSection(time_limit=text).time_limit_s == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "10:5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="D-HH:MM:SS"):
        SlurmSection(time_limit=text)


def test_a_signal_before_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="every attempt would be stopped at its start"):
        load_config(None, ["cluster.slurm.time_limit=10", "cluster.slurm.signal_before_s=600"])


def test_nodes_and_ranks() -> None:
    cluster = ClusterSection(trainer_nodes=4, engine_nodes=2, gpus_per_node=8)
    assert (cluster.ranks_on_a_node, cluster.world_size, cluster.num_nodes) == (8, 32, 6)
    assert ClusterSection(trainer_nodes=2).world_size == 2
    assert ClusterSection(gpus_per_node=8, ranks_per_node=6).world_size == 6


def test_yaml_reads_times_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cluster: {slurm: {time_limit: 24:00:00}}")
    with pytest.raises(ConfigError, match="in quotes"):
        load_config(tmp_path / "a.yaml")
