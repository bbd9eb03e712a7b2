"""What `python -m build` makes: it has every file and, installed elsewhere, runs the quickstart."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tiny_runs import TINY

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
_CACHES = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
_SOURCES = ("megatron_spear", "examples", "docs", "slurm", "tools")
_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
          "CITATION.cff", "CONTRIBUTING.md")  # fmt: skip


def _run(*words: object, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a command that ends well, with ``path`` alone as PYTHONPATH."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as `python -m build` does it, out of a copy of the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in _SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=_CACHES)
    for name in _FILES:
        shutil.copyfile(ROOT / name, copy / name)
    _run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=copy)
    assert [path.name for path in sorted((copy / "dist").iterdir())] == [
        f"megatron_spear-{_version()}-py3-none-any.whl", f"megatron_spear-{_version()}.tar.gz"
    ]  # fmt: skip
    return next((copy / "dist").glob("*.whl"))


def _version() -> str:
    (found,) = re.findall(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    return str(found)


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == _version()
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2509.22601"
    heading = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None and heading[1] == _version()


def test_the_wheel_has_every_file(wheel: Path) -> None:
    """Of the package whatever is not compiled, and the examples under it."""
    expected = {
        (Path("megatron_spear") / path.relative_to(base)).as_posix()
        for base in (ROOT / "megatron_spear", ROOT)
        for path in (base.rglob("*") if base != ROOT else (ROOT / "examples").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(about).decode()
    assert names == expected, sorted(names ^ expected)[:10]
    assert "megatron_spear/examples/alfworld/quickstart.yaml" in names
    assert "License-Expression: Apache-2.0" in metadata and "\n# megatron_spear\n" in metadata


def test_the_console_script_runs_the_quickstart_from_elsewhere(
    wheel: Path, cache: Path, tmp_path: Path
) -> None:
    """Installed without dependencies, which are this environment's; in an empty folder."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _run(*pip, "--no-deps", "--no-index", "--no-compile", "--target", site, wheel, cwd=folder)
    command = site / "bin" / "megatron-spear"
    told = _run(command, "examples", "copy", cwd=folder, path=site)
    quickstart = told.split()[-1]
    assert quickstart == "examples/alfworld/quickstart.yaml"
    assert _run(command, "--version", cwd=folder, path=site).split()[-1] == _version()
    settings = (*TINY, f"model.cache_dir={cache}", "run.steps=1", "evaluation.games=2")
    out = _run(command, "train", quickstart, *settings, cwd=folder, path=site)
    assert "SPEAR steps 1 to 1" in out
    run = folder / "runs" / "alfworld-quickstart"
    assert (run / "summary.json").is_file() and (run / "model" / "config.json").is_file()
    where = (sys.executable, "-c", "import megatron_spear.cli as m; print(m.__file__)")
    assert Path(_run(*where, cwd=folder, path=site).strip()).is_relative_to(site)
