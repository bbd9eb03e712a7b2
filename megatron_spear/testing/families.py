"""What a family of tasks must keep to, as checks to run against your own (docs/environments.md).

    from megatron_spear.config.environments.custom import CustomSection
    from megatron_spear.testing.families import check_family

    def test_my_family():
        check_family(CustomSection(family="number_game.py:NumberGame"))

Given a section of the settings, the family is also made in a process of its own: what depends on
the process (the order of a set, ``hash``) or pulls torch into environment workers is found so.
Each check raises ContractViolation with what was got and expected.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.config.schema import EvaluationSection, SftSection
from megatron_spear.data.prompts import PromptSource
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import EnvironmentFamily, Panel, family_of
from megatron_spear.envs.protocol import TextEnvironment
from megatron_spear.envs.views import AgentView, HistoryStep
from megatron_spear.errors import ConfigError
from megatron_spear.testing.contract import ContractViolation, fail
from megatron_spear.testing.environments import (
    WEIRD_TEXTS,
    check_after_end,
    check_environment,
    check_step_time,
)
from megatron_spear.trainer.seeds import panel_games, training_games, warm_start_games
from megatron_spear.types import Message, Prompt
from megatron_spear.user_code import load_callable

PROMPTS = 24
"""Training prompts that each check looks at."""
RUN_SEED = 3
TRAINING = (RUN_SEED, training_games(RUN_SEED))
"""The seeds of training prompts, as a run has them; its panel and warm start have others."""
PANEL, WARM_START = panel_games(EvaluationSection().seed), warm_start_games(SftSection().seed)


def check_family(
    family: EnvironmentFamily | EnvironmentSection,
    *,
    actions: Sequence[str] = (),
    panel: int = 4,
    distinct: int = 8,
    free_text: bool = False,
    max_step_s: float = 5.0,
) -> None:
    """All checks below.

    ``actions`` are texts that the environment understands at the start of any task; those of the
    demonstrations are taken too. ``distinct`` first training prompts must differ (0: they may
    repeat). ``free_text``: any text is an answer, so that only empty ones are refused.
    """
    section = family if isinstance(family, EnvironmentSection) else None
    made = family_of(family) if isinstance(family, EnvironmentSection) else family
    check_prompts(made, distinct=distinct)
    check_panel(made, size=panel)
    check_kinds(made, section)
    check_view(made, actions=actions)
    check_demonstrations(made, panel=panel)
    check_environments(made, actions=actions, free_text=free_text, max_step_s=max_step_s)
    if section is not None:
        check_in_another_process(section, panel=panel)


def check_prompts(family: EnvironmentFamily, *, distinct: int = 8) -> None:
    """A position always gives the same prompt; prompts can be pickled; equal names, equal tasks."""
    first, again = (family.training(*TRAINING) for _ in range(2))
    backwards = {position: again.at(position) for position in reversed(range(PROMPTS))}
    for position in range(PROMPTS):
        prompt = first.at(position)
        _check_prompt(prompt, f"the training prompt at {position}")
        if prompt != backwards[position]:
            got = _short(backwards[position])
            fail(f"the training prompt at {position}, asked for again, is", got, _short(prompt))
    drawn = [first.at(position) for position in range(PROMPTS)]
    names = [prompt.prompt_id for prompt in drawn[:distinct]]
    if len(set(names)) < len(names):
        fail(f"the first {distinct} training prompts are", ", ".join(names), "all of them others")
    _check_names(drawn, "training prompts")


def check_panel(family: EnvironmentFamily, *, size: int = 4) -> None:
    """The panel has the size that was asked for, is the same twice, and is not trained on."""
    panel = family.panel(size, PANEL)
    if not isinstance(panel, Panel) or len(panel.prompts) != size:
        fail(f"panel({size}) is", _short(panel), f"a Panel of {size} prompts")
    for prompt in panel.prompts:
        _check_prompt(prompt, "a prompt of the panel")
    again = family.panel(size, PANEL)
    if again != panel:
        fail("the panel, asked for again, is", _short(again), _short(panel))
    names = [prompt.prompt_id for prompt in panel.prompts]
    if len(set(names)) < size:
        fail("the panel's prompts are", ", ".join(names), "all of them others")
    trained = _drawn(family.training(*TRAINING))
    for prompt in panel.prompts:
        for other in trained:
            same = bool(other.metadata) and other.metadata == prompt.metadata
            if other.prompt_id == prompt.prompt_id or same:
                fail(f"{prompt.prompt_id} is", "on the panel and trained on", "one of the two")


def check_kinds(family: EnvironmentFamily, section: EnvironmentSection | None = None) -> None:
    """Prompts are of the kinds that the section (or the family) says, and each can be drawn."""
    said = section.task_kinds if section is not None else None
    kinds = family.task_kinds if said is None else said
    known = set(kinds) or {""}
    prompts = [*_drawn(family.training(*TRAINING)), *family.panel(4, PANEL).prompts]
    for prompt in prompts:
        if kinds and prompt.kind not in known:
            fail(f"{prompt.prompt_id} is of kind", repr(prompt.kind), f"one of {', '.join(kinds)}")
    if len(kinds) < 2:
        return
    sources = family.training_by_kind(*TRAINING)
    if not sources or not set(sources) <= known:
        fail("training_by_kind has", ", ".join(sources) or "nothing", f"{', '.join(kinds)}")
    for kind, source in sources.items():
        for prompt in _drawn(source, 4):
            if prompt.kind != kind:
                fail(f"training_by_kind[{kind!r}] gave kind", repr(prompt.kind), repr(kind))


def check_view(family: EnvironmentFamily, *, actions: Sequence[str] = ()) -> None:
    """Both forms of a prompt are messages, any text is parsed, and an action survives its form."""
    view = family.view()
    played = _demonstrations(family, 4)
    acted = [turn.action for one in played for turn in one.turns if turn.trained]
    for action in {*actions, *acted}:
        text = view.demonstrate(action)
        if tuple(view.parse(text)) != (action, True):
            fail(f"parse({text!r}) is", repr(tuple(view.parse(text))), f"({action!r}, True)")
        if view.void(text):
            fail(f"void({text!r}) is", "True", "False, since it acts")
    for text in WEIRD_TEXTS:
        _check_weird_parse(view, text)
    for observation, info, history in _sights(family, view, played):
        turn = len(history)
        _check_messages(view.full(observation, info, turn), f"full(.., turn={turn})")
        for past in (history[-2:], history):
            first = history[0][0] if history else observation
            messages = view.window(first, past, observation, info, turn)
            _check_messages(messages, f"window(.., {len(past)} steps, turn={turn})")


def check_demonstrations(family: EnvironmentFamily, *, panel: int = 4) -> None:
    """Demonstrations depend on their number alone, are won when played again, and show nothing of
    the panel. A family without them passes."""
    held_out = {prompt.prompt_id for prompt in family.panel(panel, PANEL).prompts}
    again = _demonstrations(family, 4)
    for index, played in enumerate(_demonstrations(family, 4)):
        what = f"demonstration {index}"
        if again[index] != played:
            fail(f"{what}, asked for again, is", _short(again[index]), _short(played))
        if pickle.loads(pickle.dumps(played)) != played:
            fail(f"{what} after pickling is", "another", "the same")
        if played.prompt is None:
            fail(f"{what} has prompt", "None", "the Prompt that was played, to play it again")
        if played.prompt.prompt_id in held_out:
            fail(f"{what} is of", f"{played.prompt.prompt_id}, on the panel", "a training task")
        _replay(family, played, what)


def check_environments(
    family: EnvironmentFamily,
    *,
    actions: Sequence[str] = (),
    free_text: bool = False,
    max_step_s: float = 5.0,
) -> None:
    """What the factory makes keeps the contract of environments on training prompts."""
    make = _maker(family)
    played = _demonstrations(family, 2)
    tasks = [(one.prompt, [t.action for t in one.turns], one.seed) for one in played if one.prompt]
    if not tasks:
        prompts = _drawn(family.training(*TRAINING), 2)
        tasks = [(prompt, list(actions), 0) for prompt in prompts]
    for prompt, own, seed in tasks:
        options = _options(family, prompt)
        check_environment(make, options=options, actions=own, seed=seed, free_text=free_text)
        check_after_end(make, options=options, actions=own, seed=seed)
        check_step_time(make, options=options, actions=own, seed=seed, max_s=max_step_s)


def check_in_another_process(section: EnvironmentSection, *, panel: int = 4) -> None:
    """Another process makes the same prompts and panel, and an environment there takes no torch."""
    family = family_of(section)
    own = _fingerprint(family, panel)
    payload = pickle.dumps((section, panel)).hex()
    code = "import sys; from megatron_spear.testing.families import _report; _report(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, payload],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
    )
    if done.returncode != 0:
        fail("making the family in another process ended with", done.stderr[-2000:], "success")
    told = json.loads(done.stdout.splitlines()[-1])
    if told["prompts"] != own:
        fail("in another process prompts and panel are", str(told["prompts"]), str(own))
    module = family.factory.partition(":")[0]
    code = "import sys; from megatron_spear.rollout.env_worker import load_factory; "
    code += "load_factory(sys.argv[1]); print([m for m in ('torch', 'transformers') "
    code += "if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, family.factory], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        fail(f"a worker that loads {family.factory} ends with", done.stderr[-2000:], "success")
    if (found := done.stdout.splitlines()[-1]) != "[]":
        fail(f"importing {module} in a worker also imports", found, "neither")


def _report(payload: str) -> None:
    section, panel = pickle.loads(bytes.fromhex(payload))
    told = {"prompts": _fingerprint(family_of(section), panel)}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def _fingerprint(family: EnvironmentFamily, panel: int) -> list[str]:
    trained = _drawn(family.training(*TRAINING), 4)
    return [*(prompt.prompt_id for prompt in trained), family.panel(panel, PANEL).sha256]


def _drawn(source: PromptSource, count: int = PROMPTS) -> list[Prompt]:
    return [source.at(position) for position in range(count)]


def _demonstrations(family: EnvironmentFamily, count: int) -> list[Demonstration]:
    """The first few; none where the family has none."""
    try:
        return [family.demonstration(SftSection(), WARM_START, index) for index in range(count)]
    except ConfigError:
        return []


def _maker(family: EnvironmentFamily) -> Any:
    factory = load_callable(family.factory, f"environment factory {family.factory!r}")
    return lambda: factory(**pickle.loads(pickle.dumps(dict(family.factory_options))))


def _options(family: EnvironmentFamily, prompt: Prompt) -> dict[str, Any]:
    return {"admissible": family.view().needs_admissible, **prompt.metadata}


def _replay(family: EnvironmentFamily, played: Demonstration, what: str) -> None:
    assert played.prompt is not None
    environment: TextEnvironment = _maker(family)()
    try:
        options = _options(family, played.prompt)
        observation, info = environment.reset(seed=played.seed, options=options)
        for number, turn in enumerate(played.turns):
            if observation != turn.observation:
                fail(f"{what} at turn {number}, played again, shows", observation, turn.observation)
            result = environment.step(turn.action)
            observation, info = result.observation, result.info
            last = number + 1 == len(played.turns)
            if (result.terminated or result.truncated) is not last:
                end = "goes on" if last else f"ends at turn {number}"
                fail(f"{what}, played again,", end, f"an end after {len(played.turns)} turns")
        if not info.get("won", False):
            fail(f"{what}, played again, ends with won =", repr(info.get("won")), "True")
    finally:
        environment.close()


def _sights(
    family: EnvironmentFamily, view: AgentView, played: Sequence[Demonstration]
) -> list[tuple[str, Mapping[str, Any], list[HistoryStep]]]:
    """(observation, info, steps before it) of the demonstrations, or of the start of tasks."""
    sights: list[tuple[str, Mapping[str, Any], list[HistoryStep]]] = []
    for one in played:
        steps = [(turn.observation, turn.action) for turn in one.turns]
        sights += [(t.observation, t.info, steps[:n]) for n, t in enumerate(one.turns)]
    if not sights:
        environment: TextEnvironment = _maker(family)()
        for prompt in _drawn(family.training(*TRAINING), 2):
            observation, info = environment.reset(seed=0, options=_options(family, prompt))
            sights += [(observation, info, []), (observation, info, [(observation, "an action")])]
        environment.close()
    return sights


def _check_weird_parse(view: AgentView, text: str) -> None:
    try:
        parsed, void = view.parse(text), view.void(text)
    except Exception as error:
        raise ContractViolation(
            f"parse or void of {text[:40]!r} raised {error!r}; expected an answer for any text"
        ) from error
    kinds = tuple(type(part) for part in (*parsed, void))
    if kinds != (str, bool, bool):
        fail(f"parse and void of {text[:40]!r} give", repr((*parsed, void)), "(str, bool), bool")


def _check_messages(messages: Sequence[Message], what: str) -> None:
    """A window may repeat answers of the policy, as role ``assistant``, but not end with one."""
    if not isinstance(messages, tuple) or not messages:
        fail(f"{what} is", repr(messages), "a tuple of messages")
    asked = ("system", "user", "tool")
    for number, message in enumerate(messages, start=1):
        repeats = what.startswith("window") and number < len(messages)
        roles = (*asked, "assistant") if repeats else asked
        if message.get("role") not in roles or not isinstance(message.get("content"), str):
            fail(f"{what} has", repr(message), f"role ({', '.join(roles)}) and content, a text")


def _check_prompt(prompt: Any, what: str) -> None:
    if not isinstance(prompt, Prompt):
        fail(f"{what} is", _short(prompt), "a Prompt")
    try:
        same = pickle.loads(pickle.dumps(prompt)) == prompt
    except Exception as error:
        raise ContractViolation(
            f"{what} ({prompt.prompt_id}) cannot be pickled ({error}); expected plain values in "
            "its metadata"
        ) from error
    if not same:
        fail(f"{what} ({prompt.prompt_id}) after pickling is", "another", "the same")


def _check_names(prompts: Sequence[Prompt], what: str) -> None:
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        if seen.setdefault(prompt.prompt_id, prompt) != prompt:
            fail(f"two {what} named {prompt.prompt_id} are", "not equal", "a name for each task")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
