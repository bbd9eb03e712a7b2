"""The folder of one attempt: everything that a launch leaves beside the run's own files.

    RUN/attempt_3/
        log/<node>/<role>_<i>.log    what each process wrote
        registry/<role>_<i>.json     servers and workers that can be reached (registry.py)
        heartbeats/rank_<i>.json     what each trainer rank does, and since when
        pids/<node>/<role>_<i>.json  which processes were started, for the sweep of a later attempt
        addresses/environment_<i>    what a worker tells its supervisor, which registers it
        preflight/<node>.json        what a node was found to be before the run began on it
        secret                       the word between the controller and environment workers
        model.json                   the Hugging Face folder that engine servers start with
        done/trainer_<i>             one for each trainer node that has ended well
        failed/<role>_<i>            why the attempt is to end: a trainer node has failed
        exclude                      nodes to leave out from now on: the run did not begin on these
        stopped.json                 the run was stopped, saved, and wants to go on
        hopeless.json                it failed in a way that no restart mends
        begun.json, ended.json       where it began, and how it was judged (restarts.py)

Attempts are numbered from 0; the newest is the one with the highest number.
"""

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.files import write_whole

BAD_NODES_NAME = "bad_nodes"
"""File in a run directory: nodes that a preflight found bad, one a line. Jobs leave them out."""

_ATTEMPT = re.compile(r"attempt_(\d+)")
_CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class Attempt:
    """Paths of one attempt; ``begin`` makes its folders."""

    path: Path

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path.parent

    @property
    def number(self) -> int:
        """0 for the first."""
        match = _ATTEMPT.fullmatch(self.path.name)
        assert match, f"{self.path} is named attempt_K"
        return int(match[1])

    @property
    def registry(self) -> Path:
        """Where servers and workers register."""
        return self.path / "registry"

    @property
    def heartbeats(self) -> Path:
        """Where trainer ranks say what they do."""
        return self.path / "heartbeats"

    @property
    def done(self) -> Path:
        """Where trainer nodes say that they have ended well."""
        return self.path / "done"

    @property
    def failed(self) -> Path:
        """Where trainer nodes say that they have failed, so that all others end too."""
        return self.path / "failed"

    @property
    def stopped_file(self) -> Path:
        """There if the run was stopped by a signal, has saved, and is to go on later."""
        return self.path / "stopped.json"

    @property
    def exclude_file(self) -> Path:
        """There if the attempt did not begin because of bad nodes: all that are to be left out from
        now on, as Slurm writes them (``n3,n7``)."""
        return self.path / "exclude"

    @property
    def secret_file(self) -> Path:
        """What environment workers and those who use them know, and nobody else."""
        return self.path / "secret"

    @property
    def hopeless_file(self) -> Path:
        """There if the attempt failed in a way that no restart mends."""
        return self.path / "hopeless.json"

    @property
    def begun_file(self) -> Path:
        """The step of the newest checkpoint and the bad nodes when the attempt began: ``{"step":
        20, "bad_nodes": ["n3"]}``."""
        return self.path / "begun.json"

    @property
    def ended_file(self) -> Path:
        """How the attempt was judged; missing while it runs, or where its machine went down."""
        return self.path / "ended.json"

    def log(self, node: str, role: str, index: int) -> Path:
        """The log file of one process."""
        return self.path / "log" / node / f"{role}_{index}.log"

    def pid_file(self, node: str, role: str, index: int) -> Path:
        """Where it is written which process has this role now."""
        return self.path / "pids" / node / f"{role}_{index}.json"

    def address_file(self, index: int) -> Path:
        """Where an environment worker writes its address, for its supervisor."""
        return self.path / "addresses" / f"environment_{index}"

    def pid_files(self, node: str) -> list[Path]:
        """Those of a node."""
        return sorted((self.path / "pids" / node).glob("*.json"))

    def tell_model(self, folder: Path) -> None:
        """Say which Hugging Face folder engine servers start with."""
        write_whole(self._model_file, json.dumps({"path": str(folder.resolve())}) + "\n")

    def model(self) -> Path | None:
        """The folder that ``tell_model`` named; None before."""
        try:
            return Path(json.loads(self._model_file.read_text(encoding="utf-8"))["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def mark_done(self, trainer_node: int) -> None:
        """Say that a trainer node has ended well."""
        write_whole(self.done / f"trainer_{trainer_node}", "")

    def num_done(self) -> int:
        """Trainer nodes that have ended well."""
        return sum(1 for _ in self.done.glob("trainer_*[0-9]"))

    def mark_failed(self, role: str, index: int, why: str) -> None:
        """Say that the attempt is to end, everywhere."""
        write_whole(self.failed / f"{role}_{index}", why + "\n")

    def failures(self) -> list[str]:
        """Why the attempt is to end; empty while all is well."""
        return [f"{path.name}: {_text(path)}" for path in sorted(self.failed.glob("*[0-9]"))]

    def mark_stopped(self, reason: str, step: int) -> None:
        """Say that the run was stopped after ``step``, which is saved."""
        write_whole(self.stopped_file, json.dumps({"reason": reason, "step": step}) + "\n")

    @property
    def _model_file(self) -> Path:
        return self.path / "model.json"

    def mark_hopeless(self, reason: str) -> None:
        """Say that no restart mends what ended this attempt: a mistake in the settings, say.

        The exit status alone does not get through: a job's is the highest of all its processes',
        and those that are killed because another one failed have higher ones.
        """
        write_whole(self.hopeless_file, json.dumps({"reason": reason}) + "\n")

    @classmethod
    def begin(cls, run: Path) -> "Attempt":
        """The next attempt of a run, with its folders."""
        numbers = [attempt.number for attempt in attempts(run)]
        attempt = cls(run / f"attempt_{max(numbers, default=-1) + 1}")
        for folder in (attempt.registry, attempt.heartbeats, attempt.done, attempt.failed):
            folder.mkdir(parents=True)
        attempt.secret_file.touch(mode=0o600)
        attempt.secret_file.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")
        begun = {"step": newest_checkpoint(run), "bad_nodes": bad_nodes(run)}
        write_whole(attempt.begun_file, json.dumps(begun) + "\n")
        return attempt

    def new_bad_nodes(self) -> list[str]:
        """Nodes of the run's ``bad_nodes`` that were not there when the attempt began."""
        try:
            before = json.loads(self.begun_file.read_text(encoding="utf-8")).get("bad_nodes", [])
        except (OSError, ValueError):
            before = []
        return [name for name in bad_nodes(self.run) if name not in before]


def attempts(run: Path) -> list[Attempt]:
    """The attempts of a run, oldest first."""
    found = [Attempt(path) for path in run.glob("attempt_*") if _ATTEMPT.fullmatch(path.name)]
    return sorted(found, key=lambda attempt: attempt.number)


def bad_nodes(run: Path) -> list[str]:
    """Nodes that preflights of a run found bad; [] if none was."""
    file = run / BAD_NODES_NAME
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def newest_checkpoint(run: Path) -> int:
    """The step of the newest committed checkpoint of a run; 0 if there is none.

    A folder ``checkpoints/step_N`` is one by its name alone: its files are not verified.
    """
    names = (_CHECKPOINT.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*"))
    return max((int(match[1]) for match in names if match), default=0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "?"
