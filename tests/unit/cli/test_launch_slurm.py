"""``launch slurm``, ``begin`` and ``end`` without a Slurm."""

import json
from pathlib import Path

import pytest

from megatron_spear.cli import launch
from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.restarts import grant_restarts
from megatron_spear.cluster.slurm import AGAIN_EXIT
from megatron_spear.config.load import dump_config, load_config
from megatron_spear.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples"
QUICKSTART = str(EXAMPLES / "alfworld" / "quickstart.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of two trainer nodes, with two restarts."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = (f"run.dir={folder}", "cluster.trainer_nodes=2", "cluster.max_restarts=2")
    (folder / "config.yaml").write_text(dump_config(load_config(None, settings)))
    return folder


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all programs that can be found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def _program(place: Path, text: str) -> None:
    place.write_text(f"#!/bin/bash\n{text}\n")
    place.chmod(0o755)


def _begin(run: Path, capsys: pytest.CaptureFixture[str]) -> Attempt:
    assert launch.run(["begin", str(run)]) == 0
    return Attempt(Path(capsys.readouterr().out.strip()))


def _end(attempt: Attempt, status: int, *more: str) -> int:
    return launch.run(["end", "--attempt", str(attempt.path), "--status", str(status), *more])


def test_a_dry_run_shows_script_and_settings_and_changes_nothing(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["slurm", QUICKSTART, "--dry-run", "--run.seed", "5", f"run.dir={run}"]
    assert launch.run(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n#SBATCH --job-name=alfworld-quickstart-")
    script, _, settings = shown.partition(f"# --- {run}/config.yaml\n")
    assert "scontrol requeue" in script and "  seed: 5\n" in settings
    assert "\n# --- the plan (megatron-spear plan)\n# tiny model, " in settings
    assert not run.exists()


def test_a_dry_run_of_a_model_that_is_elsewhere_has_no_plan(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["slurm", QUICKSTART, "--dry-run", "model.path=/there/model"]
    assert launch.run([*arguments, f"run.dir={tmp_path / 'run'}"]) == 0
    assert "\n# no plan: /there/model/config.json cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("signal_before_s", [600, 1800])
def test_a_signal_that_comes_too_late_is_told(
    tmp_path: Path,
    programs: Path,
    signal_before_s: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("alfworld/paper", "methods/drbot-gigpo-spear", "layouts/qwen2.5-7b-8gpus")
    files = [str(EXAMPLES / f"{name}.yaml") for name in names]
    _program(programs / "sbatch", "echo 12")
    settings = [f"run.dir={tmp_path / 'run'}", f"cluster.slurm.signal_before_s={signal_before_s}"]
    assert launch.run(["slurm", *files, *settings]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("job 12 is submitted")
    assert ("signal_before_s=600 is below the " in told.err) is (signal_before_s == 600)


def test_what_cannot_fit_is_refused_before_anything_is_made(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _program(programs / "sbatch", "echo 12")
    wide = [
        f"model.tiny.{name}" for name in ("hidden_size=16384", "ffn_size=65536", "num_layers=48")
    ]
    arguments = ["slurm", QUICKSTART, f"run.dir={run}", "cluster.gpus_per_node=1", *wide]
    with pytest.raises(ConfigError, match=r"on 1 x h100 .* short by"):
        launch.run(arguments)
    assert not run.exists()
    assert launch.run([*arguments, "--force"]) == 0
    assert capsys.readouterr().out.startswith("job 12 is submitted")


def test_a_launch_needs_settings_or_a_run() -> None:
    with pytest.raises(ConfigError, match="no YAML file, and no resume=DIR"):
        launch.run(["slurm"])


def test_the_script_is_submitted_and_its_job_noted(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _program(programs / "sbatch", f'[ "$*" = "--parsable {run}/job.sbatch" ] && echo "12;big"')
    assert launch.run(["slurm", QUICKSTART, f"run.dir={run}"]) == 0
    assert capsys.readouterr().out.startswith(f"job 12 is submitted; its log: {run}/job-12.log")
    assert (run / "config.yaml").is_file() and (run / "job_id").read_text() == "12\n"

    _program(programs / "squeue", '[ "${@: -1}" = --jobs=12 ] && echo PENDING')
    with pytest.raises(ConfigError, match="its job 12 is PENDING"):
        launch.run(["slurm", f"resume={run}"])
    _program(
        programs / "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
    )
    assert launch.run(["slurm", f"resume={run}"]) == 0


@pytest.mark.parametrize(
    ("sbatch", "words"),
    [(None, "sbatch is not on this machine"), ("echo no such partition >&2; exit 1", "no such")],
)
def test_what_sbatch_says_is_told(
    tmp_path: Path, programs: Path, sbatch: str | None, words: str
) -> None:
    if sbatch is not None:
        _program(programs / "sbatch", sbatch)
    with pytest.raises(ConfigError, match=words):
        launch.run(["slurm", QUICKSTART, f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "job_id").exists()


def test_the_ends_of_an_attempt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = _begin(run, capsys)
    assert attempt.path == run / "attempt_0"
    assert _end(attempt, 1) == AGAIN_EXIT
    assert "attempt 0: again: crashed with status 1" in capsys.readouterr().out
    attempt = _begin(run, capsys)
    assert _end(attempt, 1) == 1
    assert "attempt 1: failed" in capsys.readouterr().out
    attempt.mark_done(0)
    attempt.mark_done(1)
    assert _end(attempt, 0) == 0


def test_a_signal_during_the_preflight_is_a_stop(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step_7").mkdir(parents=True)
    attempt = _begin(run, capsys)
    assert _end(attempt, 143, "--phase", "preflight", "--told", "TERM") == AGAIN_EXIT
    stopped = json.loads(attempt.stopped_file.read_text())
    assert stopped == {"reason": "TERM before it began", "step": 7}


@pytest.mark.parametrize("status", [3, 137])
def test_bad_nodes_are_noted_for_the_script(
    run: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = _begin(run, capsys)
    (run / "bad_nodes").write_text("n3\nn7\n")
    assert _end(attempt, status, "--phase", "preflight", "--told", "") == AGAIN_EXIT
    assert attempt.exclude_file.read_text() == "n3,n7"
    assert "the preflight found bad nodes; 1 of 2 restarts spent" in capsys.readouterr().out
    attempt = _begin(run, capsys)
    assert _end(attempt, 0, "--phase", "node") == 1, "the budget is spent"
    assert not attempt.exclude_file.exists()


@pytest.mark.parametrize("noted", [True, False])
def test_settings_that_are_wrong_are_no_bad_nodes(
    run: Path, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "bad_nodes").write_text("n9\n")
    attempt = _begin(run, capsys)
    if noted:
        (run / "bad_nodes").write_text("n9\nn3\n")
    assert _end(attempt, 2, "--phase", "preflight") == 1
    assert "attempt 0: failed: no restart would mend this" in capsys.readouterr().out
    assert not attempt.exclude_file.exists()


def test_a_preflight_that_crashes_is_no_bad_node_because_of_earlier_ones(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_config(run / "config.yaml", ["cluster.slurm.exclude=[n13]"])
    (run / "config.yaml").write_text(dump_config(settings))
    (run / "bad_nodes").write_text("n9\n")
    attempt = _begin(run, capsys)
    assert _end(attempt, 1, "--phase", "preflight") == AGAIN_EXIT
    assert "crashed with status 1" in capsys.readouterr().out
    assert not attempt.exclude_file.exists()
    (run / "bad_nodes").write_text("n9\nn3\n")
    assert attempt.new_bad_nodes() == ["n3"]
    assert _end(attempt, 137, "--phase", "preflight") == AGAIN_EXIT
    assert attempt.exclude_file.read_text() == "n13,n9,n3"


def test_stops_by_the_time_limit_that_get_no_further_end_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ("--phase", "preflight", "--told", "USR1")
    for verdict in (AGAIN_EXIT, AGAIN_EXIT, 1):
        assert _end(_begin(run, capsys), 143, *told) == verdict
        said = capsys.readouterr().out
    assert "attempt 2: failed: " in said and "3 stops in a row without a new checkpoint" in said


def test_no_attempt_begins_once_the_run_has_failed_unseen(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    _begin(run, capsys)  # the end of the first was not seen: 2 restarts
    assert launch.run(["begin", str(run)]) == 1
    told = capsys.readouterr()
    assert not told.out and "the attempt before: failed: ended unseen" in told.err
    grant_restarts(run)  # a launch by the user
    assert _begin(run, capsys).number == 2


def test_begin_and_end_need_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        launch.run(["begin", str(tmp_path)])
