"""A changed domain or grammar is found and named."""

import pytest

from megatron_spear.envs.alfworld.rules_check import (
    check_domain,
    check_grammar,
    task_from_grammar,
)
from megatron_spear.errors import DataError


def test_own_tables_pass(grammar):
    check_grammar(grammar, "x")
    assert task_from_grammar(grammar, "x") == "Your task is to: put a clean mug in drawer."


def test_real_domain_and_grammar_pass(domain):
    from pathlib import Path

    check_domain(domain, "x")
    check_domain(domain.replace("\n", "\n ; a comment\n").upper(), "x")
    path = Path(__file__).parents[4] / ".." / "shared" / "data" / "alfworld" / "alfred_grammar.twl2"
    if not path.exists():
        pytest.skip(f"needs {path}")
    check_grammar(path.read_text(encoding="utf-8"), "x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("move {o} to {r}", "put {o} in/on {r}", "template of PutObject is 'put"),
        ("You close the", "You shut the", "rule CloseObject.feedback"),
        ("istoggled(o:object)", "ison(o:object)", "rule examineObject.feedback"),
        ("check your current inventory", "x", "feedback of help"),
        ("action look", "action peer", "feedback of look is None"),
        ('"intro": [', '"intro": {', "not JSON"),
    ],
)
def test_changed_grammar_is_named(grammar, old, new, message):
    assert old in grammar
    with pytest.raises(DataError, match=message) as error:
        check_grammar(grammar.replace(old, new), "file 7")
    assert "file 7" in str(error.value) and "alfworld-download" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(not (opened ?r))\n            )", "(opened ?r))", "action openobject"),
        ("(:action SliceObject", "(:action CutObject", "action cutobject"),
        ("(openable ?r - receptacle)", "(openable ?r ?q - receptacle)", "predicate openable is 2"),
    ],
)
def test_changed_domain_is_named(domain, old, new, message):
    assert old in domain
    with pytest.raises(DataError, match=message) as error:
        check_domain(domain.replace(old, new, 1), "file 7")
    assert "file 7" in str(error.value)


@pytest.mark.parametrize("task", ["@@TASK@@", "Your task is to: UNKNOWN GOAL", ""])
def test_task_placeholder_is_an_error(grammar, task):
    changed = grammar.replace("Your task is to: put a clean mug in drawer.", task)
    with pytest.raises(DataError, match="placeholder"):
        task_from_grammar(changed, "file 7")


def test_missing_task_is_an_error():
    with pytest.raises(DataError, match='no "task" rule'):
        task_from_grammar("grammar :: x", "file 7")
