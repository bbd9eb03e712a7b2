"""The method's benchmark: that both sides do the same, and its tables over hand-made figures."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_spear.algorithms.covariance import dropped_tokens

TOOLS = Path(__file__).parents[3] / "tools" / "benchmarks"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_of_clip_cov_drop_as_many_tokens() -> None:
    tool = _tool("clip_cov")
    samples, logprobs = tool.made_update(20_000, 50)
    section = tool.SECTION
    dropped = dropped_tokens(
        samples,
        logprobs,
        section,
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        seed=0,
        step=1,
    )
    masked = sum(int(s.response_mask.sum()) for s in samples)
    assert masked == pytest.approx(20_000, rel=0.05)
    names = ("old_logprobs", "advantages", "response_mask")
    columns = [logprobs, *([getattr(s, name) for s in samples] for name in names)]
    kept = tool.plain_drop(*map(tool._padded, columns))
    assert sum(row.sum() for row in dropped) == (kept == 0).sum() == int(0.02 * masked)
    few, *_ = tool.rows(20_000, 1)
    assert few[0] == "clip_cov, 17,819 tokens in 250 samples; torch, padded tensors"


def test_the_cost_of_a_step_by_hand() -> None:
    plain = {"wall": 4.0, "cpu": 5.0, "train/num_rows": 40.0}
    plain |= dict.fromkeys(("outside", "apart", "beyond"), 3.0)
    plain |= {f"time/{name}_s": 1.0 for name in ("rollout", "train", "current_logprobs", "replay")}
    spear = plain | {"wall": 4.6, "cpu": 6.0, "replay/rows": 20.0}
    spear |= {"outside": 3.5, "apart": 3.4, "beyond": 3.1}
    spear |= {"time/train_s": 1.3, "time/current_logprobs_s": 1.2}
    spear |= {"work/replay_train_fraction": 0.25, "work/replay_step_fraction": 0.2}
    rows = _tool("step_cost").table([spear, spear], [plain, plain])
    assert rows[0] == (
        "step: 40 new rows, 20 replayed",
        "4.600 s",
        "4.000 s",
        "+15.0% of the step (aim 10 %)",
    )
    shares = [row[3].split()[0] for row in rows[1:9]]
    assert shares[:5] == ["+20.0%", "+0.0%", "+7.5%", "+5.0%", "+0.0%"]
    assert shares[5:] == ["+12.5%", "+10.0%", "+2.5%"]
    assert [row[1] for row in rows[9:]] == ["25.0%", "20.0%"] and rows[-1][3] == "paper 10-25 %"


def test_a_step_told_apart() -> None:
    class Step:
        def run(self, ctx: object) -> argparse.Namespace:
            metrics = {f"time/{k}_s": 2.0 for k in ("rollout", "current_logprobs", "train")}
            return argparse.Namespace(metrics=metrics | {"work/replay_train_fraction": 0.25})

    found = _tool("step_cost").timed(Step(), None)
    assert 0 <= found["wall"] < 1 and found["outside"] == found["wall"] - 2.0
    assert found["apart"] == found["wall"] - 4.0 and found["beyond"] == found["wall"] - 4.5


def test_one_table_of_the_parts_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = _tool("method")

    def part(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, str, str]]:
        assert folder.is_dir()
        return [(folder.name, str(options.held), options.settings[0], "1x")]

    monkeypatch.setattr(tool, "PARTS", dict.fromkeys(("store", "clip_cov", "step"), part))
    monkeypatch.setattr(tool.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(
        sys, "argv", ["method.py", "--only", "step", "--only", "store", "run.seed=3"]
    )
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| what | ours | other | ratio (aim) |",
        "| --- | --- | --- | --- |",
        "| step | 100000 | run.seed=3 | 1x |",
        "| store | 100000 | run.seed=3 | 1x |",
    ]
    monkeypatch.setattr(sys, "argv", ["method.py", "--only", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        tool.main()


def test_ways_are_interleaved_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    ways = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = _tool("clip_cov").interleaved(ways, 2)
    assert calls == list("ababab") and np.shape(seconds) == (2, 2)
