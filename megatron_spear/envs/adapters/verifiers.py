"""Tasks of a verifiers (v1) taskset: a prompt, one answer, the task's own rewards.

The library plays its environments itself, through a server that stands in for the model; here the
rollout plays, so what needs the library's agents, tools or containers is refused.
"""

import asyncio
import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.adapters.adapted import AdaptedEnvironment, Reply
from megatron_spear.envs.adapters.library import library, require_library
from megatron_spear.errors import ConfigError, describe


class VerifiersEnvironment(AdaptedEnvironment):
    """Asks task ``options["index"]`` of the taskset; the reward is the weighted sum of its
    rewards for the answer."""

    def __init__(
        self, taskset: str, arguments: Mapping[str, Any], num_tasks: int, won_at: float
    ) -> None:
        super().__init__(won_at)
        self._tasks = load_tasks(taskset, arguments, num_tasks)
        self._task: Any = None

    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        self._task = self._tasks[options["index"]]
        return str(self._task.data.prompt_text)

    def _act(self, action: str) -> Reply:
        reward = asyncio.run(_score(self._task, action))
        return Reply(f"The reward is {reward:g}.", reward, True, False)


def load_tasks(taskset: str, arguments: Mapping[str, Any], num_tasks: int) -> tuple[Any, ...]:
    """The first tasks of a taskset, loaded once in a process.

    Raises ConfigError where there is no such taskset, or one that cannot be played here.
    """
    return _loaded(taskset, json.dumps(arguments, sort_keys=True), num_tasks)


@functools.lru_cache(maxsize=8)
def _loaded(taskset: str, arguments: str, num_tasks: int) -> tuple[Any, ...]:
    require_library("verifiers")
    vf, loaders = library("verifiers.v1"), library("verifiers.v1.utils.loaders")
    generic = library("verifiers.v1.utils.generic")
    try:
        kind = loaders.taskset_class(taskset)
        config_kind = generic.concrete_type(kind, vf.TasksetConfig) or vf.TasksetConfig
        config = config_kind(id=taskset, **json.loads(arguments))
        tasks = tuple(kind(config).take(num_tasks))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"env.taskset={taskset}: {describe(error)}") from error
    if not tasks:
        raise ConfigError(f"env.taskset={taskset}: it has no tasks; look at env.arguments")
    for need in _needs(vf, tasks[0]):
        raise ConfigError(
            f"env.taskset={taskset}: its tasks need {need}, and only a prompt, an answer and "
            "rewards of the answer are played here; choose another taskset"
        )
    return tasks


def _needs(vf: Any, task: Any) -> list[str]:
    """What a task needs beyond one answer."""
    kind, needs = type(task), []
    if kind.NEEDS_CONTAINER or task.data.image is not None:
        needs.append("a container")
    if kind.setup is not vf.Task.setup:
        needs.append("a setup in a runtime")
    if kind.toolsets(task.config):
        needs.append("tool servers")
    if task.plugged_judges():
        needs.append("a judge")
    for reward in task.hooks("reward"):
        runtime = inspect.signature(reward).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            needs.append(f"a runtime for the reward {reward.__name__}")
    return needs


async def _score(task: Any, answer: str) -> float:
    """The reward of one answer, from a trace with the prompt and it."""
    vf, graph = library("verifiers.v1"), library("verifiers.v1.graph")
    traces, states = library("verifiers.v1.trace"), library("verifiers.v1.state")
    nodes = [
        graph.MessageNode(message=vf.UserMessage(content=task.data.prompt_text)),
        graph.MessageNode(parent=0, message=vf.AssistantMessage(content=answer), sampled=True),
    ]
    trace = traces.Trace(
        task=traces.TraceTask(
            type=type(task).__name__, data=task.data, key=task.key, hash=task.hash
        ),
        state=states.state_cls(type(task))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
    )
    await task.score(trace)
    return float(trace.reward)
