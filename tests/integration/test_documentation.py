"""The documentation holds together: links, site, examples of code, names of settings, messages."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from documented_commands import ROOT, all_blocks, pages, spans

from megatron_spear.config.knobs import known_paths
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.config.sources import leaves
from megatron_spear.trainer.own_code import own_code

SECTIONS = "|".join(RunConfig.model_fields)
SETTING = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_0-9]+)+)(?:[=:][^`]*)?`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.S | re.M)


def outside_code(path: Path) -> str:
    """A page without its code, in which brackets are no links."""
    return CODE.sub("", path.read_text(encoding="utf-8"))


@cache
def anchors(path: Path) -> frozenset[str]:
    """What ``page.md#...`` may name: headings, by GitHub's rule, and anchors of its own."""
    found, seen = set[str](), dict[str, int]()
    page = re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for title in re.findall(r"^#+ +(.*)$", page, re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\s-]", "", title).strip().replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return frozenset(found | set(re.findall(r'<a id="([^"]+)">', page)))


def dead_links(path: Path) -> list[str]:
    """Links of a page to files or anchors that are not there; the web's are not tried."""
    dead = []
    for link in LINK.findall(outside_code(path)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        missing = not target.exists() or link.startswith("/")
        if missing or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(f"{path.name}: {link}")
    return dead


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[a](#a-b) [b](#b) [c](none.md) [d](page.md#c) `[e](f.md)` [g](/page.md)\n"
    )
    assert dead_links(page) == ["page.md: #b", "page.md: none.md", "page.md: page.md#c",
                                "page.md: /page.md"]  # fmt: skip


def test_files_that_pages_name_are_there() -> None:
    place = re.compile(r"(?:docs|examples|megatron_spear|slurm|tests|tools)/[\w./-]*\w")
    named = [(page, hit[0]) for page, text in spans() if (hit := place.match(text))]
    assert len(named) > 50
    assert [(page, name) for page, name in named if not (ROOT / name).exists()] == []
    package = ROOT / "megatron_spear"
    modules = [(page, text) for page, text in spans() if re.fullmatch(r"\w+/[\w/]+\.py", text)]
    gone = [(page, text) for page, text in modules if not (package / text).exists()]
    assert [(page, text) for page, text in gone if not (ROOT / text).exists()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings (links, anchors, pages outside the navigation) are errors."""
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    for path in pages():
        place = path.relative_to(ROOT / "docs" if path.parent == ROOT / "docs" else ROOT)
        if place.as_posix() == "README.md":
            continue  # that of the repository; the site begins with docs/index.md
        name = "index" if place.stem == "README" else place.stem
        assert site.joinpath(place.parent, f"{name}.html").is_file(), place


def test_links_between_docs_and_examples_are_kept(site: Path) -> None:
    assert 'href="slurm/index.html"' in (site / "cluster.html").read_text()
    assert 'href="../../math.html"' in (site / "examples/math_code/index.html").read_text()
    assert 'id="run.hang_limit_s"' in (site / "configuration.html").read_text()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe)[^>]*src="https?://|<link[^>]*href="https?://[^"]*"')
    for page in site.rglob("*.html"):
        found = [hit for hit in loads.findall(page.read_text()) if "canonical" not in hit]
        assert not found, (page.name, found)


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "tools" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("link", "place", "outside", "expected"),
    [
        ("](../slurm/README.md)", "cluster.md", False, "](slurm/README.md)"),
        ("](hooks.md#a)", "cluster.md", False, "](hooks.md#a)"),
        ("](../../docs/math.md)", "examples/math_code/README.md", True, "](../../math.md)"),
        ("](docs/math.md)", "CONTRIBUTING.md", True, "](math.md)"),
        ("](quickstart.yaml)", "examples/custom/README.md", True, "](quickstart.yaml)"),
    ],
)
def test_links_as_the_site_has_them(
    link: str, place: str, outside: bool, expected: str, hook: ModuleType
) -> None:
    assert hook.site_links(link, place, outside=outside) == expected


def test_links_to_folders_lead_to_their_pages(hook: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "README.md").touch()
    (tmp_path / "without").mkdir()
    said = "[a](with) [b](without/) [c](with/README.md) [d](https://x.y/with)"
    expected = "[a](with/README.md) b [c](with/README.md) [d](https://x.y/with)"
    assert hook.folder_links(said, tmp_path) == expected


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda b: f"{b.page}:{b.line}")
def test_code_compiles_and_its_imports_are_there(block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and "megatron_spear" in node.module:
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_the_reward_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from megatron_spear.testing.hooks import made_up_groups
    from megatron_spear.types import Coefficients, StepContext

    hook, test = [b.text for b in all_blocks("python") if b.page == "docs/rewards.md"]
    (settings,) = [b.text for b in all_blocks("yaml") if b.page == "docs/rewards.md"]
    (tmp_path / "partial_credit.py").write_text(hook)
    (tmp_path / "page_test.py").write_text(test)
    (tmp_path / "run.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runpy.run_path("page_test.py")["test_partial_credit_keeps_the_contract"]()
    made = own_code(load_config("run.yaml"))["partial_credit"]
    group = made_up_groups(1)[0]
    halves = tuple(
        replace(m, trajectory=replace(m.trajectory, env_reward=0.5)) for m in group.members
    )
    ctx = StepContext(step=1, policy_version=0, seed=0,
                      coefficients=Coefficients(intrinsic_weight=1, replay_weight=1))  # fmt: skip
    (paid,) = made.on_scored(ctx, (replace(group, members=halves),))
    for before, after in zip(halves, paid.members, strict=True):
        credit = 0.0 if before.trajectory.won else 0.15
        assert after.reward.outcome == pytest.approx(before.reward.outcome + credit)
    lost = sum(not m.trajectory.won for m in halves)
    assert 0 < lost < len(halves)
    assert made.metrics() == {"partial_credit/paid": pytest.approx(0.15 * lost)}


def test_the_shop_of_the_page_on_tools_keeps_the_contract() -> None:
    from megatron_spear.testing.environments import check_environment

    (code,) = [b.text for b in all_blocks("python") if b.page == "docs/tools.md"]
    names: dict[str, type] = {}
    exec(compile(code, "docs/tools.md", "exec"), names)
    call = '<tool_call>{"name": "price", "arguments": {"item": "fig"}}</tool_call>'
    check_environment(names["Shop"], options={"item": "fig", "cents": 7}, actions=[call, "7"])


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda b: f"{b.page}:{b.line}")
def test_settings_of_the_pages_are_settings(block, tmp_path: Path) -> None:
    settings = yaml.safe_load(block.text)
    assert isinstance(settings, dict)
    env = settings.setdefault("env", {})
    if "sandbox" in env:
        env.setdefault("type", "math_code")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    file = tmp_path / "page.yaml"
    file.write_text(yaml.safe_dump(settings))
    load_config(file)


def test_every_setting_that_a_page_names_is_there() -> None:
    known, package, wrong, right = known_paths(), ROOT / "megatron_spear", [], set()
    for path in pages():
        for name in SETTING.findall(path.read_text(encoding="utf-8")):
            module = package.joinpath(*name.split("."))
            files = (module.with_suffix(".py"), module.parent.with_suffix(".py"), module)
            is_code = any(file.exists() for file in files)
            if name not in known and not is_code and not name.endswith((".json", ".yaml", ".py")):
                wrong.append(f"{path.name}: {name}")
            right.add(name)
    assert not wrong
    assert len(right) > 150 and SETTING.findall("`run.stepps=3`") == ["run.stepps"]


def test_the_defaults_of_the_page_on_the_method_are_the_schemas() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    defaults, compared = dict(leaves(RunConfig().model_dump())), 0
    for row in re.findall(r"^\|(.*)\|$", page, re.M):
        cells = [cell.strip() for cell in row.split("|")]
        names = [name for name in SETTING.findall(cells[1]) if name in defaults]
        told = [
            float(x) if x[0].isdigit() else yaml.safe_load(x) for x in cells[2].split(", ") if x
        ]
        if len(names) == len(told):
            assert [defaults[name] for name in names] == told, row
            compared += len(names)
    assert compared >= 18


def test_every_metric_that_a_page_names_is_reported() -> None:
    said = said_by_the_program()
    names = set(re.findall(r"(?<![\w/])[a-z_]+/[a-z_0-9…]+(?![\w/])", said))
    patterns = [re.escape(name).replace("…", ".+") for name in names]
    reported = re.compile("|".join(patterns))
    prefixes = {name.partition("/")[0] for name in names} - {"docs", "tests", "tools", "runs"}
    wrong = []
    for path in pages():
        for name in re.findall(r"`([a-z_]+/[a-z_0-9]+)`", path.read_text(encoding="utf-8")):
            is_folder = (ROOT / "megatron_spear" / name).is_dir() or (ROOT / name).is_dir()
            if (
                name.partition("/")[0] in prefixes
                and not is_folder
                and not reported.fullmatch(name)
            ):
                wrong.append(f"{path.name}: {name}")
    assert not wrong
    assert {"replay/p50", "filter/…_rows"} <= names and not reported.fullmatch("replay/p51")


@cache
def said_by_the_program() -> str:
    """All texts in the source, with … for what is filled in, and those of the setup scripts."""
    found = [(ROOT / "tools" / name).read_text() for name in ("setup_env.sh", "cpu_venv.sh")]
    for path in (ROOT / "megatron_spear").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_troubleshooting_are_the_programs() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", page, re.M)
    symptoms = [row for row in rows if row not in ("what you see", "---")]
    assert len(symptoms) >= 50
    said, wrong = re.sub(r"%[sd]", "…", said_by_the_program()), []
    for quoted in re.findall(r"`([^`]+)`", "\n".join(symptoms)):
        parts = [part.strip() for part in quoted.split("…")]
        wrong += [quoted for part in parts if " " in part and part not in said]
    assert not wrong
