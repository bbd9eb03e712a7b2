"""What the settings of every environment have in common."""

from typing import Literal

from megatron_spear.config.base import PositiveInt, Section


class WindowHistory(Section):
    """Each turn's prompt is rendered anew from the task and the last ``window`` steps."""

    window: PositiveInt
    """Steps of history in the prompt (the paper uses 2)."""


History = Literal["full", "rendered"] | WindowHistory
"""How earlier turns stand in a turn's prompt."""


class EnvironmentSection(Section):
    """The task that is trained on. Each environment has a section of its own, told by ``type``."""

    history: History = "full"
    """``full``: the conversation grows, token by token; ``{window: k}``: each prompt shows the last
    k steps; ``rendered``: the chat template renders the whole conversation anew each turn, as a
    server of messages does; a turn whose prompt does not begin with the tokens so far begins a
    segment."""
    max_turns: PositiveInt = 20
    """Turns after which an attempt is over (paper: 50 in ALFWorld, 15 in WebShop)."""

    @property
    def task_kinds(self) -> tuple[str, ...]:
        """The kinds of tasks that can be drawn apart from each other; () = there is one."""
        return ()
