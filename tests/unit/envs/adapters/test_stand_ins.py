"""GEM, SkyRL Gym and verifiers behind stand-ins: modules made here with the interface that the
adapters use (gem-llm 0.1.0, skyrl-gym 0.4.0, verifiers 0.4.0). The real ones are not installed."""

import json
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_spear.config.environments.adapters import (
    GemSection,
    SkyrlGymSection,
    VerifiersSection,
)
from megatron_spear.envs.family import _made, family_of
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.testing.families import (
    check_environments,
    check_kinds,
    check_panel,
    check_prompts,
    check_view,
)

IN_ONE_PROCESS = (check_panel, check_kinds, check_view)


@pytest.fixture(autouse=True)
def fresh_families():
    _made.cache_clear()
    yield
    _made.cache_clear()


def _install(monkeypatch, name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class _Guess:
    """As gem's guessing game: the global ``random`` draws, and a suffix comes with the info."""

    def __init__(self, highest):
        self.highest = highest

    def reset(self, seed=None):
        random.seed(seed)
        self.number = random.randint(1, self.highest)
        return f"1 to {self.highest}?", {"suffix": "Guess."}

    def step(self, action):
        if action == str(self.number):
            return "Right.", 1.0, True, False, {"suffix": "Guess."}
        noise = random.random()
        return f"No ({noise}).", 0.0, False, False, {"suffix": "Guess."}


@pytest.fixture
def gem(monkeypatch):
    def make(env_id, **arguments):
        assert env_id == "game:Guess-v0"
        return _Guess(**arguments)

    return _install(monkeypatch, "gem", make=make)


def test_gem(gem):
    family = family_of(GemSection(id="game:Guess-v0", arguments={"highest": 3}))
    check_prompts(family)
    for check in IN_ONE_PROCESS:
        check(family)
    check_environments(family, actions=["9", "1", "2", "3"], free_text=True)
    from megatron_spear.envs.adapters.gem import GemEnvironment

    environment = GemEnvironment(**family.factory_options)
    assert environment.reset(seed=0, options={"seed": 4})[0] == "1 to 3?\nGuess."
    results = [environment.step("9")]
    assert results[0].observation.endswith("\nGuess.") and not results[0].info["won"]
    results.append(environment.step(str(random.Random(4).randint(1, 3))))
    assert results[1].observation == "Right." and results[1].info["won"]


class _Gsm8k:
    """As SkyRL Gym's: messages out, a dict of four."""

    def __init__(self, env_config, extras):
        self.answer, self.turns, self.closed = extras["reward_spec"]["ground_truth"], 0, False

    def init(self, prompt):
        return prompt, {}

    def step(self, action):
        self.turns += 1
        right, last = action == self.answer, self.turns == 3
        again = [] if right or last else [{"role": "user", "content": "Try again."}]
        return {
            "observations": again,
            "reward": float(right),
            "done": right or last,
            "metadata": {},
        }

    def close(self):
        self.closed = True


@pytest.fixture
def rows(tmp_path):
    def write(name, numbers):
        lines = []
        for number in numbers:
            prompt = [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"{number} + 1?"},
            ]
            answer = {"ground_truth": str(number + 1)}
            lines.append(json.dumps({"prompt": prompt, "reward_spec": answer}))
        (tmp_path / name).write_text("\n".join([*lines, ""]))
        return tmp_path / name

    return write


def test_skyrl_gym(monkeypatch, rows):
    made = _install(monkeypatch, "skyrl_gym")
    made.make = lambda id, env_config, extras: _Gsm8k(env_config, extras)
    section = SkyrlGymSection(
        id="gsm8k_multi_turn",
        train_file=rows("train.jsonl", range(30)),
        eval_file=rows("test.jsonl", range(25, 40)),
    )
    family = family_of(section)
    check_prompts(family)
    for check in IN_ONE_PROCESS:
        check(family)
    check_environments(family, actions=["no", "no", "no"], free_text=True)
    source = family.training(0, 0)
    trained = {source.at(position).prompt_id for position in range(100)}
    assert len(trained) == 25, "rows of the panel's file are left out"
    (message,) = source.at(0).messages
    assert message == {"role": "system", "content": "Be short."}
    from megatron_spear.envs.adapters.skyrl_gym import SkyrlGymEnvironment

    environment = SkyrlGymEnvironment(**family.factory_options)
    options = source.at(0).metadata
    observation, _ = environment.reset(seed=0, options=options)
    assert environment.step("0").observation == "Try again."
    result = environment.step(str(int(observation.split()[0]) + 1))
    assert result.observation == "" and result.info["won"] and result.terminated
    with pytest.raises(DataError, match="has 15 different rows"):
        family.panel(16, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: JSONDecodeError"),
        ('{"question": 1}', "KeyError: 'prompt'"),
        ('{"prompt": "2 + 2"}', "TypeError"),
        ('{"prompt": []}', "no list of messages"),
        ('{"prompt": [{"role": "user", "content": 3}]}', "no list of messages"),
    ],
)
def test_rows_that_are_none_are_told(monkeypatch, tmp_path, line, message):
    _install(monkeypatch, "skyrl_gym")
    (tmp_path / "rows.jsonl").write_text(line)
    files = {"train_file": tmp_path / "rows.jsonl", "eval_file": tmp_path / "rows.jsonl"}
    with pytest.raises(DataError, match=message):
        family_of(SkyrlGymSection(id="gsm8k", **files)).training(0, 0)


class _Data(SimpleNamespace):
    image = None
    system_prompt = "Be short."

    @property
    def prompt_text(self):
        return self.prompt

    def model_dump(self, **how):
        return {key: value for key, value in vars(self).items() if key != "idx"}


class _VfTask:
    NEEDS_CONTAINER = False
    key, hash, config = "k", "h", None

    def __init__(self, data):
        self.data = data

    async def setup(self, trace, runtime): ...

    @classmethod
    def toolsets(cls, config):
        return []

    def plugged_judges(self):
        return []

    def right(self, task, trace):
        return float(trace.last_reply == task.answer)

    def hooks(self, attr):
        return [self.right] if attr == "reward" else []

    async def score(self, trace):
        trace.reward = self.right(self.data, trace)


class _NeedsRuntime(_VfTask):
    def right(self, task, trace, runtime):
        return 1.0


class _SetsUp(_VfTask):
    async def setup(self, trace, runtime):
        await runtime.start()


@pytest.fixture
def verifiers(monkeypatch):
    """The parts of verifiers 0.4.0 that the adapter touches; ``task_kind`` may be replaced."""
    made = SimpleNamespace(task_kind=_VfTask)

    class Config:
        def __init__(self, id, highest=5):
            self.highest = highest

    class Sums:
        def __init__(self, config):
            self.config = config

        def take(self, count):
            for idx in range(min(count, self.config.highest)):
                yield made.task_kind(_Data(idx=idx, prompt=f"{idx} + 1?", answer=str(idx + 1)))

    def taskset_class(name):
        if name != "sums":
            raise ModuleNotFoundError(f"taskset {name!r} not found")
        return Sums

    class Trace(SimpleNamespace):
        @property
        def last_reply(self):
            return self.nodes[-1].message.content

    def record(**values):
        return SimpleNamespace(**values)

    _install(monkeypatch, "verifiers")
    _install(
        monkeypatch,
        "verifiers.v1",
        Task=_VfTask,
        TasksetConfig=Config,
        AgentConfig=record,
        AgentInfo=record,
        UserMessage=record,
        AssistantMessage=record,
    )
    _install(monkeypatch, "verifiers.v1.utils.loaders", taskset_class=taskset_class)
    _install(monkeypatch, "verifiers.v1.utils.generic", concrete_type=lambda kind, base: None)
    _install(monkeypatch, "verifiers.v1.graph", MessageNode=record)
    _install(monkeypatch, "verifiers.v1.trace", Trace=Trace, TraceTask=record)
    _install(monkeypatch, "verifiers.v1.state", state_cls=lambda kind: dict)
    from megatron_spear.envs.adapters.verifiers import _loaded

    _loaded.cache_clear()
    yield made
    _loaded.cache_clear()


def test_verifiers(verifiers):
    family = family_of(VerifiersSection(taskset="sums", arguments={"highest": 60}, num_tasks=50))
    check_prompts(family)
    for check in IN_ONE_PROCESS:
        check(family)
    check_environments(family, actions=["7"], free_text=True)
    prompt = family.training(0, 0).at(0)
    assert prompt.messages == ({"role": "system", "content": "Be short."},)
    from megatron_spear.envs.adapters.verifiers import VerifiersEnvironment

    environment = VerifiersEnvironment(**family.factory_options)
    observation, _ = environment.reset(seed=0, options=prompt.metadata)
    result = environment.step(str(int(observation.split()[0]) + 1))
    assert (result.reward, result.terminated, result.info["won"]) == (1.0, True, True)


@pytest.mark.parametrize(
    ("task_kind", "settings", "message"),
    [
        (_VfTask, {"taskset": "sum"}, "env.taskset=sum: ModuleNotFoundError: taskset 'sum' not"),
        (_VfTask, {"taskset": "sums", "arguments": {"colour": 1}}, "env.taskset=sums: TypeError"),
        (_VfTask, {"taskset": "sums", "arguments": {"highest": 0}}, "it has no tasks"),
        (_NeedsRuntime, {"taskset": "sums"}, "need a runtime for the reward right"),
        (_SetsUp, {"taskset": "sums"}, "need a setup in a runtime"),
    ],
)
def test_tasksets_that_cannot_be_played_are_told(verifiers, task_kind, settings, message):
    verifiers.task_kind = task_kind
    with pytest.raises(ConfigError, match=message):
        family_of(VerifiersSection(**settings))
