"""One whole step with fakes: what is called, in which order, and with what."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from step_world import CTX, LOSS, NEW_LOGPROB, group, make_step, make_world

from megatron_spear.config.losses import ClipCovLossSection, KlSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.testing.hand_made import ONE_LAYER, make_sample
from megatron_spear.trainer import gpu_memory
from megatron_spear.trainer.loop import SpearStep, finish_step_metrics
from megatron_spear.trainer.work import forward_flops
from megatron_spear.types import Origin, Update
from megatron_spear.weight_sync.in_process import InProcess

PUBLISHED = ["load_weights", "exported", "metrics", "on_step_end"]


def test_the_order_of_a_step_with_replay_and_covariance_clipping() -> None:
    world = make_world(group("a", [True, False]), group("b", [True, True]), replay=2)
    report = make_step(world, clip=True).run(CTX)
    assert world.calls == [
        "collect",
        "on_played",
        "on_scored",
        "logprobs",
        "on_samples",
        "extra_updates",
        "logprobs",
        "train_step",
        *PUBLISHED,
    ]
    own, replayed = world.asked
    # Group b compares equal rewards: it has no gradient, and no log-probs are asked for.
    assert own[0].lengths == (3, 3) and replayed[0].lengths == (4, 4)
    assert own[1] == replayed[1] == LOSS.temperature
    assert world.engine.version == report.policy_version == 3 and report.step == 3
    assert world.hook.report is report
    assert report.example is world.hook.scored[-1].members[-1]


def test_what_is_trained_by_hand() -> None:
    world = make_world(group("a", [True, False]), group("b", [True, True]), replay=2)
    make_step(world).run(CTX)
    assert world.calls.count("logprobs") == 1, "without covariance clipping replay needs none"
    (packed,) = world.trained
    ((micro,),) = packed.micro_batches
    assert sorted(packed.lengths) == [3, 3, 4, 4]
    weights = {origin: micro.token_weight[micro.origin == origin] for origin in (0, 1)}
    # Of four trajectories of two tokens, two are trained; gamma / 2 rows * 3 tokens replayed.
    assert weights[0][weights[0] > 0].tolist() == pytest.approx([1 / 40] * 4)
    assert weights[1][weights[1] > 0].tolist() == pytest.approx([0.25 / 20] * 6)
    old = {o: micro.old_logprobs[(micro.origin == o) & (micro.token_weight > 0)] for o in (0, 1)}
    assert set(old[0].tolist()) == {NEW_LOGPROB}, "the policy's own, before the update"
    assert set(old[1].tolist()) == {-0.5}, "those of collection"
    assert {s.old_logprobs[-1] for s in world.hook.samples} == {NEW_LOGPROB}


def test_metrics_of_a_step() -> None:
    world = make_world(group("a", [True, False], failed=1), group("b", [True, True]), replay=2)
    metrics = dict(make_step(world, clip=True).run(CTX).metrics)
    new, replayed = forward_flops(ONE_LAYER, [3]), forward_flops(ONE_LAYER, [4])
    rollout = forward_flops(ONE_LAYER, [3] * 4, num_logits=8)
    expected = {
        "rollout/failed": 1.0,
        "rollout/success": 0.75,
        "reward/outcome": 0.75,
        "filter/num_groups": 2.0,
        "mismatch/logprob_gap_mean": 0.25,
        "mismatch/max_logprob_gap": 0.25,
        "replay/cov_dropped_fraction": 0.0,
        "train/num_rows": 4.0,
        "train/tokens": 14.0,
        "train/num_updates": 1.0,
        "optimizer/grad_norm": 1.0,
        "optimizer/lr": 1e-3,
        "optimizer/num_skipped": 1.0,
        "loss/policy": 0.5,
        "policy/clip_fraction": 0.25,
        "weight_sync/bytes": 12.0,
        "work/rollout_tokens": 12.0,
        "work/old_logprobs_tokens": 6.0,
        "work/ref_logprobs_tokens": 0.0,
        "work/current_logprobs_tokens": 8.0,
        "work/train_tokens": 14.0,
        "work/replay_tokens": 8.0,
        "work/replay_train_fraction": replayed / (replayed + new),
        "work/replay_flops": 8 * replayed,
        "work/replay_step_fraction": 8 * replayed / (rollout + 8 * new),
        "curriculum/intrinsic_weight": 0.5,
        "curriculum/replay_weight": 0.25,
        "mine/number": 5.0,
    }
    assert {name: metrics.get(name) for name in expected} == pytest.approx(expected)
    forward = "old_logprobs ref_logprobs current_logprobs"
    phases = f"rollout advantages {forward} replay train weight_sync step"
    assert {f"time/{phase}_s" for phase in phases.split()} <= set(metrics)
    assert "loss/total" not in metrics


def test_several_mini_batches_are_several_optimizer_steps() -> None:
    world = make_world(group("a", [True, False]), group("b", [False, True]))
    metrics = make_step(world, mini_batches=2).run(CTX).metrics
    assert [len(packed.lengths) for packed in world.trained] == [2, 2]
    assert metrics["train/num_updates"] == 2 and metrics["optimizer/num_skipped"] == 1
    assert metrics["optimizer/grad_norm"] == 1.5 and metrics["loss/policy"] == 0.75
    assert metrics["policy/num_tokens"] == 8


def test_an_empty_step_trains_nothing_and_still_publishes() -> None:
    world = make_world(group("a", [True, True]), group("b", [False, False]))
    report = make_step(world, clip=True, mini_batches=2).run(CTX)
    before = ["collect", "on_played", "on_scored", "on_samples", "extra_updates"]
    assert world.calls == [*before, *PUBLISHED]
    assert world.engine.version == report.policy_version == 3
    assert report.metrics["train/num_updates"] == report.metrics["train/num_rows"] == 0
    assert "time/train_s" in report.metrics
    assert world.hook.samples == []
    assert not any(name.startswith(("loss/", "mismatch/")) for name in report.metrics)


def test_a_step_of_replayed_rows_only_is_trained() -> None:
    world = make_world(group("a", [True, True]), replay=3)
    metrics = make_step(world).run(CTX).metrics
    (packed,) = world.trained
    assert packed.lengths == (4, 4, 4) and metrics["train/num_updates"] == 1


def test_failures_are_never_scored() -> None:
    world = make_world(group("a", [True, False], failed=2), group("b", [], failed=2))
    metrics = make_step(world).run(CTX).metrics
    scored = [str(m.trajectory.id) for group in world.hook.scored for m in group.members]
    assert scored == [str(s.trajectory_id) for s in world.hook.samples] == ["a/0", "a/1"]
    assert metrics["rollout/failed"] == 4 and metrics["rollout/num_trajectories"] == 2


def test_the_engines_own_logprobs_save_the_forward_pass() -> None:
    world = make_world(group("a", [True, False]))
    metrics = make_step(world, old_logprobs="engine").run(CTX).metrics
    assert "logprobs" not in world.calls and metrics["work/old_logprobs_tokens"] == 0
    ((micro,),) = world.trained[0].micro_batches
    assert set(micro.old_logprobs[micro.token_weight > 0].tolist()) == {-0.5}
    assert "mismatch/logprob_gap_mean" not in metrics, "nothing was compared"


def test_a_rank_without_data_takes_part_in_publishing_only() -> None:
    world = make_world()
    step = SpearStep(
        policy=world.policy,
        weight_sync=InProcess(source=world.policy, receiver=None),
        controller=None,
        loss=LOSS,
        algorithm=AlgorithmSection(),
        replay=ReplaySection(),
        tokens_per_microbatch=100,
    )
    assert step.run(CTX).policy_version == 3 and world.calls == ["exported"]


def test_servers_on_the_same_gpus_take_their_memory_when_every_rank_has_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_world(group("a", [True, False]))
    calls, memory = world.calls, SimpleNamespace()
    memory.release = lambda: calls.append("servers give back")
    memory.resume = lambda: calls.append("servers take")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("a rank gives back"))
    monkeypatch.setattr(gpu_memory, "all_true", lambda _: calls.append("so have all"))
    dataclasses.replace(make_step(world), share_gpus=True, engine_memory=memory).run(CTX)
    assert calls.index("servers give back") < calls.index("train_step")
    given_back = calls.index("a rank gives back")
    assert calls[given_back - 1 : given_back + 4] == [
        "train_step",
        "a rank gives back",
        "so have all",
        "servers take",
        "load_weights",
    ]


def test_numbers_of_the_optimizer_step_by_hand() -> None:
    sums = {"grad_norm": 2.0, "lr": 0.1, "skipped": 0.0, "loss/total": 3.0}
    sums |= {"replay/num_tokens": 4.0, "replay/sum_kl": 1.0, "policy/num_tokens": 0.0}
    assert finish_step_metrics(sums) == {
        "optimizer/grad_norm": 2.0,
        "optimizer/lr": 0.1,
        "optimizer/num_skipped": 0.0,
        "replay/num_tokens": 4.0,
        "replay/kl": 0.25,
    }


def test_a_kl_asks_the_reference_and_trains_samples_without_advantage() -> None:
    world = make_world(group("a", [True, False]), group("b", [True, True]))
    metrics = make_step(world, kl=KlSection(coef=0.1)).run(CTX).metrics
    assert world.calls[3:7] == ["logprobs", "on_samples", "extra_updates", "ref_logprobs"]
    assert metrics["work/ref_logprobs_tokens"] == metrics["work/old_logprobs_tokens"] == 12
    ((micro,),) = world.trained[0].micro_batches
    assert len(world.trained[0].lengths) == 4, "equal rewards move the policy back to the reference"
    weights = micro.regularizer_weight
    assert weights[weights > 0].tolist() == pytest.approx([1 / 40] * 8)
    assert set(micro.ref_logprobs[weights > 0].tolist()) == {NEW_LOGPROB}


def test_a_kl_asks_the_reference_for_the_hooks_on_policy_samples_too() -> None:
    world = make_world(group("a", [True, False]))
    rows = (make_sample("more", mask=[0, 1, 1, 1]),)
    world.updates = [Update(samples=rows, origin=Origin.ON_POLICY)]
    world.updates += make_world(replay=1).updates
    make_step(world, kl=KlSection(coef=0.1)).run(CTX)
    ((micro,),) = world.trained[0].micro_batches
    regularized = micro.regularizer_weight > 0
    assert int(regularized.sum()) == 2 * 2 + 3
    assert set(micro.ref_logprobs[regularized].tolist()) == {NEW_LOGPROB}
    assert not micro.ref_logprobs[micro.origin == 1].any(), "replayed rows have no KL"


def test_norms_of_new_and_replayed_gradients_are_taken_apart() -> None:
    world = make_world(group("a", [True, False]), replay=3)
    make_step(world, replay={"gradient_norms": True}).run(CTX)
    (own,), (replayed,) = world.trained, world.apart
    assert replayed is not None and own.lengths == (3, 3) and replayed.lengths == (4, 4, 4)


def test_a_separate_step_of_replayed_rows() -> None:
    world = make_world(group("a", [True, False]), replay=3)
    metrics = make_step(world, replay={"combine": "separate_step"}).run(CTX).metrics
    assert [call for call in world.calls if "step" in call][:2] == ["train_step", "own step"]
    assert metrics["train/num_updates"] == 2 and metrics["train/num_rows"] == 5


def test_covariance_of_later_mini_batches_reads_the_weights_of_then() -> None:
    world = make_world(group("a", [True, False]), group("b", [False, True]))
    make_step(world, mini_batches=2, loss=ClipCovLossSection()).run(CTX)
    assert world.calls[3:9] == [
        "logprobs",
        "on_samples",
        "extra_updates",
        "train_step",
        "logprobs",
        "train_step",
    ]
