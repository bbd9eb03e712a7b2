"""wandb as a sink: online where an API key is present, else offline, and silent on the console.

wandb buffers: a killed process can lose its last seconds here, never in ``metrics.jsonl``. An
offline run is uploaded later with ``wandb sync RUN_DIR/wandb/offline-run-*``.
"""

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megatron_spear.files import write_whole

log = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
_HOSTS = ("api.wandb.ai",)
_INIT_LIMIT_S = 20.0
_FINISH_LIMIT_S = 60.0


class WandbSink:
    """Records of a run in wandb, against the axis ``step``.

    A resumed run goes on under the id kept in the run directory. Steps that are written again after
    a resume appear once more in wandb's history, at the same place on the axis.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(
        cls, folder: Path, *, project: str, name: str, config: Mapping[str, Any]
    ) -> "WandbSink":
        """Start wandb in ``folder``; an online start that fails falls back to offline, told once.

        Raises whatever wandb raises when not even offline works.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = wandb_mode(wandb.Settings().base_url)
        options = {"project": project, "name": name, "config": dict(config), "id": _run_id(folder)}
        try:
            run = _start(wandb, folder, mode, options)
        except Exception as error:  # of any kind: there is no server
            if mode != "online":
                raise
            log.warning("wandb: no connection (%s); this run is kept offline", _first_line(error))
            wandb.teardown()
            mode = "offline"
            run = _start(wandb, folder, mode, options)
        run.define_metric("*", step_metric="step")
        log.info("wandb: %s", run.url if mode == "online" else f"offline in {folder / 'wandb'}")
        return cls(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one record to wandb's own process."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Finish the run; waits at most a minute for the upload."""
        self._run.finish()


def wandb_mode(base_url: str) -> str:
    """``WANDB_MODE`` where set; else online with an API key (environment, ~/.netrc), or offline.

    ``base_url`` is the server wandb would talk to.
    """
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return "offline"
    hosts = {urlparse(base_url).hostname, *_HOSTS}
    return "online" if hosts & set(known) else "offline"


def _start(wandb: Any, folder: Path, mode: str, options: Mapping[str, Any]) -> Any:
    settings = wandb.Settings(
        mode=mode,
        silent=True,
        console="off",
        save_code=False,
        init_timeout=_INIT_LIMIT_S,
        finish_timeout=_FINISH_LIMIT_S,
    )
    return wandb.init(dir=folder, resume="allow", settings=settings, **options)


def read_run_id(folder: Path) -> str | None:
    """The wandb id kept in a run directory; None where there is none yet."""
    path = folder / ID_FILE
    return (path.read_text().strip() if path.is_file() else "") or None


def write_run_id(folder: Path, run_id: str) -> None:
    """Keep a wandb id in a run directory: the next launch goes on under it."""
    write_whole(folder / ID_FILE, run_id + "\n")


def _run_id(folder: Path) -> str:
    """The run's wandb id, made at the first launch."""
    run_id = read_run_id(folder)
    if run_id is None:
        run_id = secrets.token_hex(4)
        write_run_id(folder, run_id)
    return run_id


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
