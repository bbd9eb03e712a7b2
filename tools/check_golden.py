"""Run recorded vector files through the official mode and count the cases that match.

    python tools/check_golden.py ../shared/golden

Each ``*.json`` of the folder is ``{"cases": [{name, inputs, params, expected}]}``; other files are
left out, and so is JSON without cases under a name that has no check. A file with cases and no
check counts as not matched. The last line is ``golden: M matched, T total`` (a unit is a case);
exit status 0 only when M == T > 0, 1 when something did not match, 2 when something is unreadable
or the folder holds no vector file.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_spear.errors import DataError, SpearError
from megatron_spear.testing.golden import CHECKS, case_differences
from megatron_spear.testing.golden.compare import read_cases

MAX_SHOWN = 5  # lines of one case


def vector_files(folder: Path) -> list[Path]:
    """The vector files of a folder, by name; raises `DataError`."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with recorded vector files.")
    paths = sorted(folder.glob("*.json"))
    found = [path for path in paths if path.stem in CHECKS or has_cases(path)]
    if not found:
        raise DataError(
            f"{folder}: got {len(paths)} JSON files, none with recorded cases; expected names like "
            "agg_loss.json."
        )
    return found


def has_cases(path: Path) -> bool:
    """Whether JSON of an unknown name is a vector file; raises `DataError` for bad JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a JSON vector file.") from None
    return isinstance(found, dict) and "cases" in found


def check_file(path: Path) -> tuple[int, int]:
    """Print the file's line and its differences; returns (matched, total) cases."""
    cases = read_cases(path)
    check = CHECKS.get(path.stem)
    if check is None:
        print(f"{path.stem}  0/{len(cases)}  (no check yet)")
        return 0, len(cases)
    found = [(case["name"], case_differences(check, case)) for case in cases]
    num_matched = sum(not lines for _, lines in found)
    print(f"{path.stem}  {num_matched}/{len(cases)}")
    for name, lines in found:
        if lines:
            print(f"  {name}:")
            print("\n".join(f"    {line}" for line in lines[:MAX_SHOWN]))
        if len(lines) > MAX_SHOWN:
            print(f"    and {len(lines) - MAX_SHOWN} more")
    return num_matched, len(cases)


def check_folder(folder: Path) -> int:
    """Print a line for each file and the summary; returns the exit status."""
    counts = [check_file(path) for path in vector_files(folder)]
    num_matched = sum(matched for matched, _ in counts)
    num_total = sum(total for _, total in counts)
    print(f"golden: {num_matched} matched, {num_total} total")
    return 0 if num_matched == num_total > 0 else 1


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of the recorded vector files")
    try:
        return check_folder(parser.parse_args(arguments).folder)
    except SpearError as error:
        print(f"check_golden: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
