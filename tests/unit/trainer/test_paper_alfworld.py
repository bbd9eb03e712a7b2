"""The paper's ALFWorld setting: its settings go together, and a game is played as it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.envs.alfworld.task import fresh_game, game_prompt
from megatron_spear.envs.family import family_of
from megatron_spear.rewards.compose import trajectory_reward
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.engine import GenerationRequest
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.testing.fakes import CHATML, ScriptedEngine, answer_text, word_tokenizer
from megatron_spear.trainer.evaluation_stats import statistics
from megatron_spear.types import Status, Trajectory, TrajectoryGroup

PAPER = Path(__file__).parents[3] / "examples" / "alfworld" / "paper.yaml"

GOOD = "<think>hm</think><action>look</action>"
WITHOUT_THOUGHT = "<action>inventory</action>"
IMPOSSIBLE = "<think>hm</think><action>fly</action>"


@pytest.fixture(scope="module")
def paper() -> RunConfig:
    return load_config(PAPER)


@pytest.fixture(scope="module")
def played(paper: RunConfig) -> Iterator[tuple[TrajectoryGroup, list[str]]]:
    """A game in which every fifth answer lacks its thought and every tenth is impossible; the
    prompts."""
    answers = {
        turn: IMPOSSIBLE if turn % 10 == 9 else WITHOUT_THOUGHT if turn % 5 == 4 else GOOD
        for turn in range(50)
    }
    tokenizer = word_tokenizer(list(answers.values()), CHATML)
    family, prompts = family_of(paper.env), {}

    class KeepsPrompts(ChatRenderer):
        def initial(self, messages, tools=()):
            tokens = super().initial(messages, tools)
            prompts[len(prompts)] = messages[-1]["content"]
            return tokens

    def answer(request: GenerationRequest) -> list[int]:
        tokens: list[int] = answer_text(tokenizer, answers[request.seed[-1]]).tolist()
        return tokens

    game = game_prompt(fresh_game(0, 0, ("pick_and_place_simple",), paper.env.generator))
    with EnvironmentPool(family.factory, workers=1, deadline_s=30.0) as pool:
        rollouter = Rollouter(
            ScriptedEngine(answer, max_context=4096),
            pool,
            KeepsPrompts(tokenizer),
            family.view(),
            paper.rollout,
            history=paper.env.history,
            max_turns=paper.env.max_turns,
        )
        (group,) = rollouter.collect_sync([game], group_size=1, seed=(0,), temperature=0.4)
    yield group, [prompts[i] for i in range(len(prompts))]


def member(played: tuple[TrajectoryGroup, list[str]]) -> Trajectory:
    (trajectory,) = played[0].members
    return trajectory


def test_the_settings_go_together(paper: RunConfig) -> None:
    assert check_config(paper, 8) == []
    assert (paper.rollout.prompts_per_step, paper.rollout.group_size) == (32, 8)
    assert (paper.evaluation.temperature, paper.evaluation.top_p) == (0.4, 1.0)


def test_a_game_ends_after_50_turns(played: tuple[TrajectoryGroup, list[str]]) -> None:
    trajectory = member(played)
    assert trajectory.status is Status.TRUNCATED_TURNS and len(trajectory.turns) == 50
    assert len(trajectory.segments) == 50, "each prompt is rendered anew"


def test_the_prompt_has_the_last_two_steps(played: tuple[TrajectoryGroup, list[str]]) -> None:
    _, prompts = played
    for turn, text in enumerate(prompts):
        shown = [number for number in range(60) if f"[{number}] you saw: " in text]
        assert shown == [number for number in (turn - 1, turn) if number > 0]
        assert text.count("you did: ") == min(turn, 2)
        assert "Your task is to: " in text and "'look'" in text and "<action> </action>" in text
    assert "you did: fly" in prompts[11] and "you did: fly" not in prompts[12]


def test_an_invalid_action_costs_a_tenth_on_its_turn(
    paper: RunConfig, played: tuple[TrajectoryGroup, list[str]]
) -> None:
    """Ten of 50: five without a thought, which are played all the same, and five impossible."""
    trajectory = member(played)
    invalid = [number for number, turn in enumerate(trajectory.turns) if not turn.valid]
    assert invalid == list(range(4, 50, 5))
    assert trajectory.turns[4].action_text == "inventory"
    reward = trajectory_reward(trajectory, paper.reward)
    assert reward.format == pytest.approx(-0.1 * 10 / 50) and reward.outcome == 0.0


def test_success_is_told_by_task_type(played: tuple[TrajectoryGroup, list[str]]) -> None:
    told = statistics([played[0]], attempts=1, seed=0)
    assert list(told["by_kind"]) == ["pick_and_place_simple"]
    assert told["trajectories"]["invalid_turn_fraction"] == 0.2
