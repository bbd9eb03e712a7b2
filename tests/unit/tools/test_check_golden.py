"""The vector checker names what does not match, and passes only when every case does."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.testing.golden import case_differences
from megatron_spear.testing.golden.advantages import flat_rows
from megatron_spear.testing.golden.compare import number_differences

TOOL = Path(__file__).parents[3] / "tools" / "check_golden.py"
# Two rows of one group: mean 1, unbiased std sqrt(2).
RIGHT: dict[str, Any] = {
    "name": "pair",
    "inputs": {"token_level_rewards": [[0.0, 2.0], [0.0, 0.0]], "mask": [[1, 1], [0, 1]]}
    | {"uid": ["a", "a"]},
    "params": {"dtype": "float64"},
    "expected": {
        "no_std": [[1.0, 1.0], [0.0, -1.0]],
        "norm_std": [[1 / (2**0.5 + 1e-6)] * 2, [0.0, -1 / (2**0.5 + 1e-6)]],
    },
}


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_golden", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(folder: Path, name: str, *cases: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"source": "", "cases": cases}))


def _altered() -> dict[str, Any]:
    case = copy.deepcopy(RIGHT) | {"name": "altered"}
    case["expected"]["no_std"][1][1] = -1.001
    return case


def test_right_cases_pass(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "grpo_advantage", RIGHT)
    (tmp_path / "alfworld_transcripts.jsonl.xz").write_bytes(b"no vector file")
    (tmp_path / "about.json").write_text('{"seed": 1}')
    assert tool.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == "grpo_advantage  1/1\ngolden: 1 matched, 1 total\n"


def test_altered_case_is_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "grpo_advantage", RIGHT, _altered())
    assert tool.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "grpo_advantage  1/2",
        "  altered:",
        "    no_std[1, 1]: got -1.0, recorded -1.001 (1 of 4 differ)",
        "golden: 1 matched, 2 total",
    ]


def test_file_without_check_is_not_matched(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "grpo_advantage", RIGHT)
    _write(tmp_path, "unheard_of", RIGHT, RIGHT)
    assert tool.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == ["unheard_of  0/2  (no check yet)", "golden: 1 matched, 3 total"]


def test_case_without_a_field_is_not_matched(tool: ModuleType) -> None:
    case = copy.deepcopy(RIGHT)
    del case["inputs"]["uid"]
    (line,) = case_differences(tool.CHECKS["grpo_advantage"], case)
    assert line == "could not be checked: KeyError: 'uid'"


def test_nothing_to_check_is_no_success(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "about.json").write_text('{"seed": 1}')
    assert tool.main([str(tmp_path)]) == 2
    assert "got 1 JSON files, none with recorded cases" in capsys.readouterr().err
    _write(tmp_path, "grpo_advantage")
    assert tool.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "grpo_advantage  0/0\ngolden: 0 matched, 0 total\n"


def _read_aloud(value: Any) -> Any:
    """The value with each non-finite number as a word."""
    if isinstance(value, dict):
        return {key: _read_aloud(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_aloud(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


NAN, INF = float("nan"), float("inf")
ROOT = 0.5**0.5
WORDS: dict[str, dict[str, Any]] = {
    "masked_ops": {  # the second token of each row is not trained, so only whitening shows it
        "inputs": {"values": [[1.0, NAN], [3.0, -INF]], "mask": [[1.0, 0.0], [1.0, 0.0]]},
        "expected": {
            "masked_sum": 4.0,
            "masked_mean": 2.0,
            "masked_mean_axis1": [1.0, 3.0],
            "masked_var": 2.0,
            "masked_whiten": [[-ROOT, NAN], [ROOT, -INF]],
            "masked_whiten_noshift": [[2 - ROOT, NAN], [2 + ROOT, -INF]],
        },
    },
    "recalibrated_advantage": {
        "inputs": {
            "token_level_rewards": [[0.0, 1.0], [0.0, -INF]],
            "mask": [[1.0, 0.0], [1.0, 1.0]],
            "group_mean_history": [0.5, 0.5, 0.5, 0.5, INF],
            "group_std_history": [1.0],
        },
        "expected": {
            "mean_p50": 0.5,
            "std_p50": 1.0,
            "no_std": [[0.5, 0.0], [-INF, -INF]],
            "norm_std": [[0.5, 0.0], [-INF, -INF]],
            "keep_no_std": [True, False],
            "keep_norm_std": [True, False],
            "keep_ge_no_std": [True, False],
            "keep_ge_norm_std": [True, False],
        },
    },
}


@pytest.mark.parametrize("stem", WORDS)
def test_numbers_may_be_the_words_nan_and_inf(tool: ModuleType, stem: str) -> None:
    params = {"dtype": "float32", "percentile": 50}
    case = _read_aloud({"name": stem, "params": params} | WORDS[stem])
    assert '"-inf"' in json.dumps(case) and "Infinity" not in json.dumps(case)
    assert case_differences(tool.CHECKS[stem], case) == []


def test_a_recorded_permutation_is_replayed_never_drawn(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of two tokens are eligible (covariance 1 each), one is dropped: the first of ``perm``."""

    def drawn(*_: Any) -> None:
        raise AssertionError("a permutation was drawn")

    monkeypatch.setattr(torch, "randperm", drawn)
    params = {"dtype": "float32", "agg": "seq-mean-token-sum", "clip_low": 0.2, "clip_high": 0.2}
    params |= {"cov_ratio": 0.5, "cov_lb": 0.5, "cov_ub": 5.0}
    for first in (0, 1):
        case = {
            "inputs": {
                "log_prob": [[-1.0, -3.0]],
                "old_log_prob": [[-1.0, -3.0]],
                "advantages": [[1.0, -1.0]],
                "mask": [[1.0, 1.0]],
                "perm": [first, 1 - first],
            },
            "params": params,
            "expected": {
                "pg_loss": [1.0, -1.0][first],
                "pg_clipfrac": 0.5,
                "ppo_kl": 0.0,
                "pg_clipfrac_lower": 0.0,
                "grad_log_prob": [[[0.0, 1.0]], [[-1.0, 0.0]]][first],
                "covariance": [[1.0, 1.0]],
                "eligible": [[0, 0], [0, 1]],
                "dropped": [[0, first]],
                "n_clip": 1,
            },
        }
        assert case_differences(tool.CHECKS["policy_loss_clip_cov"], case) == []
        case["inputs"]["perm"] = [first]
        (line,) = case_differences(tool.CHECKS["policy_loss_clip_cov"], case)
        assert "one place in the draw for each eligible token" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("grpo_advantage", "{", "cannot be read"),
        ("unheard_of", "{", "cannot be read"),
        ("grpo_advantage", "{}", "a list named cases"),
        ("grpo_advantage", '{"cases": [{"name": "a"}]}', "case 0: expected the fields name"),
    ],
)
def test_broken_file(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    message: str,
) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text(text)
    assert tool.main([str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert str(path) in printed and message in printed


def test_missing_folder(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "recorded", "dtype", "matches"),
    [
        (1.0 + 1.9e-9, 1.0, "float64", True),
        (1.0 + 2.1e-9, 1.0, "float64", False),
        (1.0 + 3.9e-4, 1.0, "float32", True),
        (1.0 + 4.1e-4, 1.0, "float32", False),
        (float("nan"), "nan", "float64", True),
        (0.0, "nan", "float64", False),
        (float("-inf"), "-inf", "float64", True),
        (float("inf"), "-inf", "float64", False),
        (1.0, "inf", "float64", False),
        ([1.0, 1.0], 1.0, "float64", False),
        (np.zeros((0, 3)), [], "float64", True),
        (np.zeros((0, 3)), [1.0], "float64", False),
    ],
)
def test_what_matches(got: Any, recorded: Any, dtype: str, matches: bool) -> None:
    assert (list(number_differences("x", got, recorded, dtype)) == []) is matches


def test_flat_rows() -> None:
    values, labels = np.array([1.0, 1.0 + 1e-7, 2.0, 5.0, 4.0]), np.array([0, 0, 1, 1, 2])
    assert flat_rows(values, labels).tolist() == [True, True, False, False, False]
