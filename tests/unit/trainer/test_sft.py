"""The warm start's folder is named by all that it is made from."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.config.load import load_config
from megatron_spear.deadlines import StopFlag
from megatron_spear.envs.alfworld.task import fresh_game
from megatron_spear.trainer import sft


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _name(model: Path, *settings: str) -> str:
    return sft.cached_folder(load_config(None, settings), model).name


def _games(folder: Path, number: int = 0) -> Path:
    game = fresh_game(0, number, ("pick_and_place_simple",), GeneratorSection())
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(json.dumps(game.to_fields()))
    return folder


def test_it_lies_in_the_cache(model: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"model.cache_dir={tmp_path / 'cache'}"])
    assert sft.cached_folder(config, model).parent == tmp_path / "cache"


@pytest.mark.parametrize(
    "setting",
    [
        "rollout.max_context=64",
        "policy.precision=bf16",
        "env.max_turns=7",
        "env.history={window: 2}",
        "sft.observation_weight=0.7",
        "sft.decision_weight=7",
        "sft.optimizer.lr=0.7",
    ],
)
def test_the_name_depends_on_what_it_is_made_from(setting: str, model: Path) -> None:
    assert _name(model, setting) != _name(model)


def test_the_name_depends_on_nothing_else(model: Path) -> None:
    other = ("run.seed=7", "run.dir=x", "policy.tokens_per_microbatch=999", "rollout.group_size=3")
    assert _name(model, *other) == _name(model)


def test_the_name_depends_on_the_models_content(model: Path) -> None:
    before = _name(model)
    (model / "config.json").write_text("[]")
    assert _name(model) != before


def test_the_name_depends_on_the_games_and_not_on_where_they_lie(
    model: Path, tmp_path: Path
) -> None:
    one, same = _games(tmp_path / "one"), _games(tmp_path / "same")
    before = _name(model, f"env.games={one}")
    assert _name(model, f"env.games={same}") == before != _name(model)
    _games(one, number=1)
    assert _name(model, f"env.games={one}") != before


def test_the_name_depends_on_the_users_own_code(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "number_game.py"
    example = Path(__file__).parents[3] / "examples" / "custom" / "number_game.py"
    file.write_text(example.read_text())
    settings = ("env.type=custom", f"env.family={file}:NumberGame")
    before = _name(model, *settings)
    assert _name(model, *settings) == before != _name(model, *settings, "env.settings.width=9")
    file.write_text(example.read_text() + "# another\n")
    assert _name(model, *settings) != before


class _Policy:
    """Has a cycle, as a wrapped module and its hooks."""

    def __init__(self) -> None:
        self.own = self

    def train_step(self, *_: Any) -> dict[str, float]:
        return {"sft/num_tokens": 2.0, "sft/sum_nll": 1.0}

    def export_weights(self) -> Iterator[Any]:
        yield self


def test_its_policy_is_gone_before_servers_and_the_next_policy_need_the_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[weakref.ref[_Policy]] = []

    def from_hf(*_: Any) -> _Policy:
        policy = _Policy()
        policies.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(sft.MegatronPolicy, "from_hf", from_hf)
    config = load_config(None, ["sft.steps=2"])
    other_rank: Any = SimpleNamespace(is_controller=False)
    bar: Any = SimpleNamespace(advance=lambda *_, **__: None)
    gc.disable()
    try:
        sft.warm_start(config, model, tmp_path, other_rank, None, bar, StopFlag())
        assert policies[0]() is None
    finally:
        gc.enable()
