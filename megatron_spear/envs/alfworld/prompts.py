"""The two prompt styles of ALFWorld: ``compact`` for small models, ``official`` as in the paper."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_spear.envs.plain_view import PlainView
from megatron_spear.envs.views import TASK_MARK, AgentView, TaggedView


def alfworld_view(style: Literal["compact", "official"]) -> AgentView:
    """The view of ``env.prompt``."""
    return CompactView() if style == "compact" else OfficialView()


class CompactView(PlainView):
    """The game's own words and nothing else. Its first observation lists the places and the
    task."""


class OfficialView(TaggedView):
    """The paper's prompt."""

    role = "You act in a household text game (ALFRED, embodied) and must finish one task."

    def opening(self, observation: str, info: Mapping[str, Any]) -> Sequence[str]:
        """The first observation, which ends with the task."""
        return [observation.strip()]

    def task(self, first_observation: str, info: Mapping[str, Any]) -> str:
        """The task's sentence."""
        return task_of(first_observation)


def task_of(first_observation: str) -> str:
    """What follows ``Your task is to:``; the whole text where the mark is missing.

    Example: ``"You are ...\\n\\nYour task is to: put a mug in desk."`` gives ``"put a mug in
    desk."``.
    """
    _, mark, task = first_observation.partition(TASK_MARK)
    return task.strip() if mark else first_observation.strip()
