"""The job scripts in slurm/ are what their settings give now."""

import importlib.util
import subprocess
from pathlib import Path

from megatron_spear.cluster.signal_time import signal_warning
from megatron_spear.config.load import load_config

ROOT = Path(__file__).parents[3]


def test_the_scripts_are_current() -> None:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "slurm_templates.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    scripts = tool.scripts()
    assert {place.name for place in (ROOT / "slurm").glob("*.sbatch")} == {p.name for p in scripts}
    for place, text in scripts.items():
        assert place.read_text(encoding="utf-8") == text, "run python tools/slurm_templates.py"
        subprocess.run(["bash", "-n", str(place)], check=True, timeout=10)
    for settings in (ROOT / "slurm").glob("*.yaml"):
        assert signal_warning(load_config(settings)) is None, settings.name
    page = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{place.name}]({place.name})" in page for place in scripts)
