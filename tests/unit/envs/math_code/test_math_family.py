"""Math for the trainer: prompts from files or made, a panel never trained on, demonstrations."""

import json
from pathlib import Path

import pytest

from megatron_spear.config.environments import math_code as settings
from megatron_spear.config.load import load_config
from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.envs.family import family_of
from megatron_spear.envs.math_code import grading
from megatron_spear.envs.math_code.arithmetic import ARITHMETIC_KINDS, is_held_out
from megatron_spear.envs.math_code.environment import MathCodeEnvironment
from megatron_spear.envs.sandbox import fusion, local
from megatron_spear.errors import ConfigError, DataError


def config(*overrides: str):
    return load_config(None, ["env.type=math_code", "env.stderr_lines=1", *overrides])


def family(*overrides: str):
    return family_of(config(*overrides).env)


def write(path: Path, *problems: tuple[str, str]) -> Path:
    rows = [
        {"id": f"{path.stem}-{i}", "problem": p, "answer": a} for i, (p, a) in enumerate(problems)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fresh_problems_as_prompts():
    source = family().training(0, 4)
    prompt = source.at(3)
    assert prompt == family().training(9, 4).at(3) != family().training(0, 5).at(3)
    assert prompt.env == "math_code" and prompt.kind in ARITHMETIC_KINDS
    assert prompt.metadata == {"problem": prompt.metadata["problem"], "answer": prompt.answer}
    assert not any(is_held_out(source.at(i).metadata["problem"]) for i in range(200))


def test_by_kind():
    sources = family("env.arithmetic.kinds=[sum, range]").training_by_kind(0, 4)
    assert {kind: source.at(0).kind for kind, source in sources.items()} == {
        "sum": "sum",
        "range": "range",
    }


def test_the_panel_is_held_out_and_the_same_everywhere():
    panel = family().panel(40, 2)
    assert panel == family().panel(40, 2)
    texts = {prompt.metadata["problem"] for prompt in panel.prompts}
    assert len(texts) == 40 and all(map(is_held_out, texts))
    assert panel.sha256 != family().panel(40, 6).sha256
    with pytest.raises(ConfigError, match="give a number"):
        family().panel(None, 2)


def test_a_panel_larger_than_what_there_is():
    few = family("env.arithmetic.largest=9", "env.arithmetic.kinds=[product]")
    with pytest.raises(DataError, match=r"found 1?[0-9] different problems up to"):
        few.panel(40, 2)


def test_files_to_train_on_and_their_kinds(tmp_path):
    one = write(tmp_path / "one.jsonl", ("p1", "1"), ("p2", "2"), ("p3", "3"))
    two = write(tmp_path / "two.jsonl", ("q1", "4"), ("q2", "5"))
    loaded = family(f"env.problems=[{one}, {two}]", f"env.eval_problems=[{two}]")
    assert config(f"env.problems=[{tmp_path}]").env.task_kinds == ("one", "two")
    prompts = [loaded.training(0, 0).at(i) for i in range(6)]
    assert {p.prompt_id for p in prompts[:3]} == {"one-0", "one-1", "one-2"}
    assert {p.answer for p in prompts} == {"1", "2", "3"}, "the panel's are left out"
    assert list(loaded.training_by_kind(0, 0)) == ["one"]
    assert [p.prompt_id for p in loaded.panel(1, 0).prompts] == ["two-0"]
    assert [p.prompt_id for p in loaded.panel(None, 0).prompts] == ["two-0", "two-1"]
    with pytest.raises(DataError, match="have 2 problems"):
        loaded.panel(3, 0)


def test_a_panel_of_a_file_named_for_an_evaluation(tmp_path):
    file = tmp_path / "amc.jsonl"
    rows = [{"id": f"amc-{i}", "problem": f"What is {i}?", "answer": str(i)} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = family_of(settings.MathCodeSection().with_panel(str(file))).panel(None, 0)
    assert [prompt.kind for prompt in panel.prompts] == ["amc"] * 3
    with pytest.raises(ConfigError, match="--panel nowhere: no such file"):
        settings.MathCodeSection().with_panel("nowhere")


def test_files_that_are_all_on_the_panel(tmp_path):
    one = write(tmp_path / "one.jsonl", ("What is  1?", "1"))
    two = write(tmp_path / "two.jsonl", ("what is 1?", "1"))
    with pytest.raises(DataError, match="are on the panel"):
        family(f"env.problems=[{one}]", f"env.eval_problems=[{two}]").training(0, 0)


def demonstrations(count: int, *overrides: str):
    run = config(*overrides)
    made = family_of(run.env)
    return [made.demonstration(run.sft, 1, index) for index in range(count)]


def test_a_demonstration_calls_reads_and_answers():
    (played,) = demonstrations(1, "sft.noise=0", "env.arithmetic.kinds=[product]")
    first, last = played.turns
    code = json.loads(first.action.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert code["name"] == "code_interpreter" and first.trained and last.trained
    assert last.observation == str(eval(code["arguments"]["code"][len("print(") : -1]))
    assert last.action == f"\\boxed{{{last.observation}}}"
    assert last.info == {"replies": [last.observation]} and first.info == {}


def test_slips_are_answered_and_not_learned():
    played = demonstrations(60, "sft.noise=0.6")
    assert played == demonstrations(60, "sft.noise=0.6")
    seen = set()
    for demonstration in played:
        assert 2 <= len(demonstration.turns) <= 4
        assert [turn.trained for turn in demonstration.turns[-2:]] == [True, True]
        for turn, after in zip(demonstration.turns, demonstration.turns[1:], strict=False):
            if not turn.trained:
                seen.add(after.observation.partition(" at character")[0])
    assert seen == {
        "(no output; print what you want to see)",
        "SyntaxError: '(' was never closed",
        "NameError: name 'prin' is not defined",
        "error: not valid JSON (Expecting ',' delimiter",
    }
    assert all(len(d.turns) == 2 for d in demonstrations(20, "sft.noise=1", "env.max_turns=2"))


def test_guesses_answer_at_once_and_are_wrong():
    played = demonstrations(80, "env.arithmetic.guesses=0.5")
    guessed = [d.turns[0] for d in played if len(d.turns) == 1]
    assert 25 < len(guessed) < 55 and all(turn.trained for turn in guessed)
    for turn in guessed:
        value = int(turn.action.removeprefix("\\boxed{").removesuffix("}"))
        assert turn.action == f"\\boxed{{{value}}}"
    assert all(len(d.turns) == 1 for d in demonstrations(10, "env.arithmetic.guesses=1"))


def test_the_tiny_tokenizer_reads_all_of_it():
    vocabulary = family().vocabulary()
    tokenizer = make_tokenizer(
        vocabulary.words,
        vocabulary.phrases,
        roles=vocabulary.roles,
        single_digits=vocabulary.single_digits,
    )
    for played in demonstrations(100, "sft.noise=0.6", "env.arithmetic.largest=99999"):
        for turn in played.turns:
            for text in (turn.observation, turn.action):
                ids = tokenizer.encode(text)
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 42")) == [" ", "4", "2"]
    (role,) = tokenizer.encode("<|tool|>")
    assert tokenizer.decode([role, role], skip_special_tokens=True) == ""


def test_the_official_view_lists_the_tool_and_says_what_to_do():
    view = family("env.prompt=official").view()
    system, user = view.full("What is 1+1?", {}, 0)
    assert system["role"] == "system" and "\\boxed{}" in system["content"]
    assert user == {"role": "user", "content": "What is 1+1?"}
    assert view.tools[0]["function"]["name"] == "code_interpreter"
    assert view.tools == (MathCodeEnvironment.tools[0].schema(),)
    (reply,) = view.full("2", {"replies": ["2"]}, 1)
    assert reply == {"role": "tool", "content": "2"}
    compact = family().view()
    assert compact.tools == () and len(compact.full("What is 1+1?", {}, 0)) == 1


def test_the_settings_know_what_waits_for_how_long():
    assert settings.GRADER_CLOCK_FACTOR == grading.CLOCK_FACTOR
    assert settings.SANDBOX_GRACE_S == local.GRACE_S
    assert settings.SANDBOX_QUEUE_S == fusion.QUEUE_S
    assert settings.MathCodeSection().sandbox.timeout_s == 30.0
