"""Each published form of math problems is read as it is, and what cannot be read is told."""

import json
from pathlib import Path

import pytest

from megatron_spear.envs.math_code.problems import Problem, load_problems
from megatron_spear.errors import DataError

SHARED = Path(__file__).resolve().parents[5] / "shared" / "data" / "math"
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def published_row(text: str, answer: str, index: str | None) -> dict:
    """A row as DAPO-Math-17k has them."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_problem_with_an_answer(tmp_path):
    file = write(
        tmp_path / "aime24.jsonl",
        {"id": "aime24-01", "problem": " What is $1+1$? ", "answer": "2"},
        {"problem": "What is half of one?", "answer": 0.5},
    )
    assert load_problems([file]) == [
        Problem("aime24-01", "aime24", "What is $1+1$?", "2"),
        Problem("aime24/2", "aime24", "What is half of one?", "0.5"),
    ]


def test_gsm8k_gives_what_follows_the_hashes(tmp_path):
    file = write(
        tmp_path / "gsm8k_test.jsonl",
        {"question": "How much?", "answer": "He pays 600 * 2 = <<600*2=1200>>1200\n#### 1,200"},
    )
    assert load_problems([file]) == [Problem("gsm8k_test/1", "gsm8k_test", "How much?", "1200")]


def test_dapo_math_as_it_is_published(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra math)")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        published_row(f"{BEFORE}Find $n$.{AFTER}", "34", "a1"),
        published_row("Find\n\n$m$.", "-7", "b2"),
        published_row(f"{BEFORE}Find\n\n$k$.{AFTER}", "113", "c3"),
    ]
    file = tmp_path / "dapo-math-17k.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows * 100), file, row_group_size=64)
    assert load_problems([file]) == [
        Problem("dapo-math-17k/a1", "dapo-math-17k", "Find $n$.", "34"),
        Problem("dapo-math-17k/b2", "dapo-math-17k", "Find\n\n$m$.", "-7"),
        Problem("dapo-math-17k/c3", "dapo-math-17k", "Find\n\n$k$.", "113"),
    ]


def test_rows_without_an_index_are_told_apart_by_their_text(tmp_path):
    rows = [published_row(text, "1", None) for text in ("Find a.", "find  A.", "Find b.")]
    (first, second) = load_problems([write(tmp_path / "dapo.jsonl", *rows)])
    assert (first.text, second.text) == ("Find a.", "Find b.")


def test_a_folder_is_all_its_files_and_a_problem_counts_once(tmp_path):
    write(tmp_path / "b.jsonl", {"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2"})
    write(tmp_path / "a.jsonl", {"problem": "P", "answer": "1"})
    (tmp_path / "LICENSE").write_text("MIT")
    found = load_problems([tmp_path, tmp_path / "a.jsonl"])
    assert [(p.kind, p.text) for p in found] == [("a", "P"), ("b", "q")]


def test_an_id_is_one_problems(tmp_path):
    for folder, *texts in (("gsm8k", "p", "q"), ("math", "P", "r"), ("copy", "q", "p")):
        (tmp_path / folder).mkdir()
        rows = [{"problem": text, "answer": "1"} for text in texts]
        write(tmp_path / folder / "train.jsonl", *rows)
    found = load_problems([tmp_path / "gsm8k", tmp_path / "copy"])
    assert [(p.id, p.text) for p in found] == [("train/1", "p"), ("train/2", "q")]
    told = r"math/train\.jsonl: its problem train/2 is not .*gsm8k/train\.jsonl; .* different names"
    with pytest.raises(DataError, match=told):
        load_problems([tmp_path / "gsm8k", tmp_path / "math"])
    write(tmp_path / "math" / "train.jsonl", {"id": "m2", "problem": "r", "answer": "1"})
    found = load_problems([tmp_path / "gsm8k", tmp_path / "math"])
    assert [p.id for p in found] == ["train/1", "train/2", "train/m2"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1], "got a list"),
        ({"text": "p"}, "got a row with text"),
        ({"problem": "p"}, "the answer is None"),
        ({"problem": "", "answer": "1"}, "the problem is ''"),
        ({"problem": "p", "answer": True}, "the answer is True"),
        ({"question": "q", "answer": "12"}, "has no ####"),
        ({"prompt": "p", "reward_model": {"ground_truth": "1"}}, "0 messages of the user"),
        ({"prompt": [{"role": "user", "content": "p"}]}, '"reward_model" is None'),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, told):
    file = write(tmp_path / "a.jsonl", {"problem": "fine", "answer": "1"}, row)
    with pytest.raises(DataError, match=r"a\.jsonl, row 2") as raised:
        load_problems([file])
    assert told in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "d.parquet").write_bytes(b"PAR1, not really")
    (tmp_path / "e.csv").write_text("p,1")
    (tmp_path / "folder").mkdir()
    for name, told in [
        ("a.jsonl", "no JSON"),
        ("empty.jsonl", "has no problem"),
        ("c.jsonl", "expected UTF-8"),
        ("d.parquet", "cannot be read as parquet|needs pyarrow"),
        ("e.csv", "of another kind"),
        ("folder", "a folder without them"),
        ("nowhere.jsonl", "no such file"),
    ]:
        with pytest.raises(DataError, match=told):
            load_problems([tmp_path / name])


def test_a_parquet_file_of_other_columns_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra math)")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "label": "1"}]), file)
    with pytest.raises(DataError, match="no reward_model"):
        load_problems([file])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published problem files are not here")
def test_the_published_files():
    found = load_problems([SHARED])
    sizes = {kind: sum(p.kind == kind for p in found) for kind in {p.kind for p in found}}
    assert sizes == {
        "aime24": 30,
        "aime25": 30,
        "amc23": 40,
        "math500": 500,
        "gsm8k_test": 1319,
        "gsm8k_train": 7473,
    }
    answers = {p.id: p.answer for p in found}
    assert answers["aime24-01"] == "204" and answers["gsm8k_test/1"] == "18"
    assert all(
        float(a) == int(float(a)) for p, a in answers.items() if p.startswith(("aime", "gsm8k"))
    )
