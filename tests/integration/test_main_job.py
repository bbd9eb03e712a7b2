"""The main job from end to end: what three steps leave behind, and that it is true."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.tracking.evaluations import read_evaluations
from megatron_spear.tracking.recorded_files import FOLDER, list_steps, read_step

pytestmark = pytest.mark.timeout(300)

PAGE = Path(__file__).parents[2] / "docs" / "run-directory.md"


@pytest.fixture(scope="module")
def finished(
    spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    run_dir = tmp_path_factory.mktemp("main-job") / "run"
    settings = ("run.steps=3", "policy.optimizer.lr=0.01", "run.name=three", "tracking.curves=true")
    done = spear("train", f"run.dir={run_dir}", *settings)
    return run_dir, done


def test_the_run_directory_has_every_file(finished: tuple[Path, Any]) -> None:
    run_dir, done = finished
    assert (run_dir / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (run_dir / "curves.png").stat().st_size > 10_000
    assert f"curves: {run_dir / 'curves.png'}" in done.out
    assert json.loads((run_dir / "versions.json").read_text())["torch"]
    assert "steps: 3" in (run_dir / "config.yaml").read_text()
    assert not list(run_dir.rglob("*.tmp")) and not list(run_dir.glob(".*"))
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_3"]


def test_the_summary_says_what_the_run_came_to(finished: tuple[Path, Any]) -> None:
    from megatron_spear.tracking.summary import REQUIRED

    run_dir, done = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(REQUIRED) <= set(summary)
    assert (summary["name"], summary["steps"], summary["panel_games"]) == ("three", 3, 4)
    assert len(summary["panel_sha256"]) == 64
    assert summary["rollout_tokens_per_s"] > 0 and summary["train_tokens_per_s"] > 0
    for shown in ("Evaluation before", "SPEAR steps 1 to 3", "Evaluation after", "Summary"):
        assert shown in done.out


def test_each_step_is_recorded_once_and_trains(
    finished: tuple[Path, Any], training_records: Callable[[Path], dict[int, dict[str, Any]]]
) -> None:
    run_dir, _ = finished
    records = training_records(run_dir)
    assert list(records) == [1, 2, 3]
    for record in records.values():
        assert record["rollout/num_trajectories"] == 8
        assert record["rollout/failed"] == 0
        assert record["train/num_rows"] > 0 and record["optimizer/grad_norm"] > 0
        assert record["work/train_flops"] < record["work/step_flops"]
        assert 0 <= record["work/replay_step_fraction"] < 1
    assert max(r["mismatch/max_logprob_gap"] for r in records.values()) < 1e-3
    evaluated = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in evaluated if "eval/success" in r] == [0, 3]


def test_each_game_of_the_panel_is_recorded(finished: tuple[Path, Any]) -> None:
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    before, after = read_evaluations(run_dir / "evaluations.jsonl")
    assert (before.step, after.step) == (0, 3)
    assert {before.panel_sha256, after.panel_sha256} == {summary["panel_sha256"]}
    assert (before.success, after.success) == (summary["success_before"], summary["success_after"])
    assert len(before.won) == len(after.won) == 4


def test_the_trajectories_of_each_step_are_recorded(
    finished: tuple[Path, Any], training_records: Callable[[Path], dict[int, dict[str, Any]]]
) -> None:
    """What the files say adds up to the metrics of the step."""
    run_dir, _ = finished
    records = training_records(run_dir)
    assert list_steps(run_dir / FOLDER) == list(records)
    for step, record in records.items():
        recorded = read_step(run_dir / FOLDER, step)
        played, replayed = recorded.trajectories, recorded.replayed
        assert recorded.policy_version == step - 1 and recorded.num_trajectories == len(played) == 8
        assert np.mean([t.won for t in played]) == record["rollout/success"]
        totals = [t.reward.total for t in played if t.reward]
        assert np.mean(totals) == pytest.approx(record["reward/mean"], abs=1e-6)
        assert sum(t.stored for t in played) == record["replay/inserted"]
        assert len(replayed) == record["replay/rows"]
        assert len(replayed) + sum(t.trained for t in played) == record["train/num_rows"]
        assert all(row.advantage > 0 and row.age == step - row.step for row in replayed)
        turns = [turn for t in played for turn in t.turns]
        num_tokens = sum(len(turn.tokens) for turn in turns)
        assert num_tokens == record["rollout/action_tokens"]
        for turn in turns:
            assert turn.text == "".join(turn.tokens)
            assert len(turn.rollout_logprobs) == len(turn.tokens)
            assert turn.finish_reason in ("stop", "length")
            assert turn.versions == ((step - 1, len(turn.tokens)),)
    assert any(row.id == t.id for row in replayed for t in _recorded_before(run_dir, step))


def _recorded_before(run_dir: Path, step: int) -> list[Any]:
    earlier = (read_step(run_dir / FOLDER, number) for number in range(1, step))
    return [trajectory for recorded in earlier for trajectory in recorded.trajectories]


def test_the_page_names_every_file_and_its_example_runs(
    finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = finished
    page = PAGE.read_text()
    named = {
        name.split("/")[0].split("-")[0]
        for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for name in re.findall(r"`(.*?)`", row)
    }
    assert {path.name.split("-")[0] for path in run_dir.iterdir()} <= named
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(example.replace("runs/alfworld-quickstart", str(run_dir)), {})
    told = capsys.readouterr().out.splitlines()
    steps = [line.split()[0] for line in told if not line.startswith("  ")]
    assert steps == ["1", "2", "3"] and any("replayed 0." in line for line in told)


def test_the_exported_model_is_the_trained_policy(finished: tuple[Path, Any]) -> None:
    """Plain transformers on ``model`` == the policy of the last checkpoint, != the warm start."""
    run_dir, done = finished
    (warm,) = [Path(x.split(": ")[1]) for x in done.out.splitlines() if "from the cache: " in x]
    tokens = _tokens(run_dir / "model")
    ours = _plain_logprobs(run_dir / "model", tokens)
    last = _policy_logprobs(warm, run_dir / "checkpoints" / "step_3" / "policy", tokens)
    np.testing.assert_allclose(ours, last, atol=1e-4)
    assert np.abs(ours - _plain_logprobs(warm, tokens)).max() > 0.01


def test_a_second_run_takes_the_warm_start_from_the_cache(
    spear: Callable[..., Any], tmp_path: Path
) -> None:
    done = spear("train", f"run.dir={tmp_path / 'run'}", "run.steps=1")
    assert "from the cache: " in done.out and "sft step" not in done.out


def test_wandb_runs_offline_without_a_key(
    spear: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    done = spear("train", f"run.dir={tmp_path / 'run'}", "run.steps=1", "tracking.wandb=true")
    assert "wandb" not in done.err
    assert f"\nwandb: offline in {tmp_path / 'run' / 'wandb'}\n" in done.out
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (records,) = folder.glob("*.wandb")
    assert b"rollout/success" in records.read_bytes()


def test_a_broken_wandb_costs_a_warning_only(
    spear: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_spear.tracking.wandb_sink import WandbSink

    def refuse(*args: Any, **options: Any) -> WandbSink:
        raise RuntimeError("no wandb today")

    monkeypatch.setattr(WandbSink, "open", refuse)
    done = spear("train", f"run.dir={tmp_path / 'run'}", "run.steps=1", "tracking.wandb=true")
    assert "wandb cannot be used: RuntimeError: no wandb today" in done.out + done.err
    assert (tmp_path / "run" / "summary.json").is_file()


def test_evaluate_plays_the_panel_as_the_run_did(
    finished: tuple[Path, Any], command: Callable[..., Any]
) -> None:
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    # No policy is made, so its layout does not matter.
    done = command("evaluate", str(run_dir), "policy.tensor_parallel=2")
    result = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())
    assert result["mean_at_n"]["value"] == summary["success_after"]
    by_kind = {kind: told["value"] for kind, told in result["by_kind"].items()}
    assert by_kind == summary["success_by_task_type"]
    assert result["panel"] == {"sha256": summary["panel_sha256"], "prompts": 4}
    assert summary["panel_sha256"][:16] in done.out
    command("evaluate", str(run_dir))
    assert (run_dir / "evaluation-2" / "evaluation.json").is_file(), "nothing is overwritten"


def _tokens(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    text = "You are in the middle of a room. go to desk 1 take mug 1 from desk 1"
    tokens: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(tokens) > 10
    return tokens


def _plain_logprobs(folder: Path, tokens: list[int]) -> np.ndarray:
    """Log-probs of tokens 1.. by transformers alone, float32 ``[L - 1]``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        values = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return values.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def _policy_logprobs(start: Path, checkpoint: Path, tokens: list[int]) -> np.ndarray:
    """Log-probs of tokens 1.. by the Megatron policy of a checkpoint, float32 ``[L - 1]``."""
    from megatron_spear.config.schema import OptimizerSection, PolicySection
    from megatron_spear.data.packing import pack
    from megatron_spear.policy import cpu

    cpu.install()
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.types import Origin

    section = PolicySection()
    context = parallel.initialize(section, seed=0)
    try:
        policy = MegatronPolicy.from_hf(start, section, OptimizerSection(), 3, context)
        policy.load(checkpoint)
        packed = pack(
            [_sample(tokens)],
            [np.zeros(len(tokens), np.float32)],
            [Origin.ON_POLICY],
            data_parallel=1,
            tokens_per_microbatch=512,
            pad_multiple=policy.pad_multiple,
        )
        values: np.ndarray = policy.logprobs(packed, 1.0)[0][1:]
        return values
    finally:
        parallel.destroy()


def _sample(tokens: list[int]) -> Any:
    from megatron_spear.types import Reward, TrainSample, TrajectoryId

    length = len(tokens)
    mask = np.ones(length, bool)
    mask[0] = False
    zeros = np.zeros(length, np.float32)
    return TrainSample(
        trajectory_id=TrajectoryId(group="g", member=0),
        segment=0,
        num_segments=1,
        prompt_id="p",
        token_ids=np.array(tokens, np.int32),
        response_mask=mask,
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        advantages=zeros,
        reward=Reward(outcome=1.0),
        turn_starts=np.array([0], np.int32),
        anchors=("",),
        policy_version=0,
    )
