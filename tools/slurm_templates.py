#!/usr/bin/env python
"""Makes the job scripts in slurm/ from the settings beside them: python tools/slurm_templates.py.

They are what ``megatron-spear launch slurm`` would submit. A test holds them to be current.
"""

from functools import partial
from pathlib import Path

from megatron_spear.cli.launch_common import launchable
from megatron_spear.cluster.slurm import render, slurm_problems

FOLDER = Path(__file__).parents[1] / "slurm"
LAUNCHED_IN = Path("/shared/work")
"""The folder of the launch, where relative paths start."""


def scripts() -> dict[Path, str]:
    """Each script's place and text."""
    found = {}
    for settings in sorted(FOLDER.glob("*.yaml")):
        config = launchable(str(settings), [], partial(slurm_problems, folder=LAUNCHED_IN))
        found[settings.with_suffix(".sbatch")] = render(config, config.run.dir, LAUNCHED_IN)
    return found


if __name__ == "__main__":
    for place, text in scripts().items():
        place.write_text(text, encoding="utf-8")
        print(place)
