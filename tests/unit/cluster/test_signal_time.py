"""When a job is told that its time is over: a step and a save before, by the plan."""

import re

from megatron_spear.cluster.signal_time import signal_warning
from megatron_spear.config.load import load_config

RUN = (
    "preset=qwen2.5-7b-8gpus",
    "model.path=/elsewhere/Qwen2.5-7B-Instruct",
    "policy.precision=bf16",
    "rollout.engine=sglang",
    "rollout.colocated=true",
    "weight_sync.transport=disk",
    "cluster.gpus_per_node=8",
    "cluster.servers={count: 4, program: sglang, tensor_parallel: 2}",
)


def test_a_signal_is_to_come_a_step_and_a_save_before_the_end() -> None:
    warning = signal_warning(load_config(None, [*RUN, "cluster.slurm.signal_before_s=1"]))
    assert warning is not None
    words = r"signal_before_s=1 is below the (\d+) s that a step \((\d+) s\) and a save \((\d+) s\)"
    found = re.search(words, warning)
    assert found is not None, warning
    both, step, save = map(int, found.groups())
    assert step > 1 and abs(both - step - save) <= 1
    assert save == 11, "7.6 B parameters of 14 bytes at 10 GB/s"
    for before_s, warns in ((both + 1, False), (both - 1, True), (step, True)):
        config = load_config(None, [*RUN, f"cluster.slurm.signal_before_s={before_s}"])
        assert (signal_warning(config) is not None) is warns


def test_nothing_is_said_of_what_cannot_be_planned() -> None:
    late = "cluster.slurm.signal_before_s=1"
    assert signal_warning(load_config(None, [late])) is None, "CPU nodes"
    unknown = ("preset=null", "model.path=/elsewhere/model")
    assert signal_warning(load_config(None, [*RUN, *unknown, late])) is None
    impossible = "policy.tensor_parallel=3"
    assert signal_warning(load_config(None, [*RUN, impossible, late])) is None
