"""Replay recorded TextWorld transcripts on the ALFWorld engine and measure its speed.

    python tools/check_alfworld.py --games valid_seen.jsonl.xz --transcripts
    alfworld_transcripts.jsonl.xz \\
        --domain alfred.pddl --grammar alfred.twl2

Each transcript entry counts as matched when feedback, admissible actions (in any order) and the won
flag are equal. The last line is ``alfworld: M matched, T total, S steps/s``; exit status 0 only
when M == T > 0.
"""

import argparse
import json
import lzma
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import GameFile, GameState, parse_game
from megatron_spear.envs.alfworld.rules_check import check_domain, check_grammar
from megatron_spear.envs.alfworld.sources import load_games
from megatron_spear.envs.alfworld.text import intro
from megatron_spear.errors import DataError, SpearError

MAX_SHOWN = 5
MIN_TIMED_S = 1.0


def read_transcripts(path: Path) -> list[dict[str, Any]]:
    """Rows ``{id, transcript: [{action, feedback, admissible, won}]}``; raises `DataError`."""
    opener = lzma.open if path.suffix == ".xz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream if line.strip()]
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected one JSON row a game."
        ) from None
    for number, row in enumerate(rows, start=1):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("transcript"), list)
            or "id" not in row
        ):
            raise DataError(f"{path}, row {number}: expected the fields id and transcript.")
    return rows


def replay(game_file: GameFile, transcript: list[dict[str, Any]]) -> Iterator[list[str]]:
    """For each entry, the differences found (an empty list when it matches)."""
    state = GameState(parse_game(game_file))
    for entry in transcript:
        action = entry["action"]
        feedback = intro(state) if action is None else act(state, action).feedback
        found = {"feedback": feedback, "admissible": admissible_actions(state), "won": state.won}
        yield [
            f"{name}: got {found[name]!r}, recorded {entry[name]!r}"
            for name in found
            if not same(found[name], entry[name])
        ]


def same(found: Any, recorded: Any) -> bool:
    """Equal, lists in any order; an entry given twice has to be there twice."""
    if isinstance(found, list) and isinstance(recorded, list):
        return Counter(found) == Counter(recorded)
    return bool(found == recorded)


def measure_steps_per_s(games: dict[str, GameFile], rows: list[dict[str, Any]]) -> float:
    """Steps a second (action, admissible actions and goal check) over repeated replays."""
    plays = [
        (parse_game(games[row["id"]]), [entry["action"] for entry in row["transcript"][1:]])
        for row in rows
        if row["id"] in games
    ]
    num_steps, started, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < MIN_TIMED_S and any(actions for _, actions in plays):
        for game, actions in plays:
            state = GameState(game)
            for action in actions:
                act(state, action)
                admissible_actions(state)
                _ = state.won
            num_steps += len(actions)
        elapsed = time.perf_counter() - started
    return num_steps / elapsed if elapsed else 0.0


def check(options: argparse.Namespace) -> int:
    """Print the differences and the summary; returns the exit status."""
    check_domain(options.domain.read_text(encoding="utf-8"), str(options.domain))
    check_grammar(options.grammar.read_text(encoding="utf-8"), str(options.grammar))
    games = {game.id: game for game in load_games(options.games)}
    rows = read_transcripts(options.transcripts)
    num_matched = num_total = num_shown = 0
    for row in rows:
        num_total += len(row["transcript"])
        if row["id"] not in games:
            print(f"{row['id']}: not among the games of {options.games}")
            continue
        for number, differences in enumerate(replay(games[row["id"]], row["transcript"])):
            num_matched += not differences
            if differences and num_shown < MAX_SHOWN:
                num_shown += 1
                action = row["transcript"][number]["action"]
                print(f"{row['id']}, entry {number}, action {action!r}:")
                print("  " + "\n  ".join(differences))
    steps_per_s = measure_steps_per_s(games, rows)
    print(f"alfworld: {num_matched} matched, {num_total} total, {steps_per_s:.0f} steps/s")
    return 0 if num_matched == num_total > 0 else 1


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--games", type=Path, required=True, help="packed games (.jsonl.xz) or a game tree"
    )
    parser.add_argument("--transcripts", type=Path, required=True, help="recorded play (.jsonl.xz)")
    parser.add_argument("--domain", type=Path, required=True, help="alfred.pddl")
    parser.add_argument("--grammar", type=Path, required=True, help="alfred.twl2")
    try:
        return check(parser.parse_args(arguments))
    except (SpearError, OSError, KeyError) as error:
        print(f"check_alfworld: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
