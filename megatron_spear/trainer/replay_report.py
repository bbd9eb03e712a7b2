"""``inspect replay`` in words: the store, its best rows, single rows with their text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_spear.replay.contents_text import overview, printable, row_text
from megatron_spear.trainer.replay_of_run import FoundStore, make_decoder, tokenizer_folder


def store_in_words(found: FoundStore, top: int) -> list[str]:
    """What the store holds, with the ``top`` prompts that have the most rows."""
    position = "no checkpoint says which rows are spent: all are taken as live"
    if found.checkpoint is not None:
        position = (
            f"as checkpoint step_{found.checkpoint} has it (policy version {found.policy_version})"
        )
        if found.num_newer:
            position += f", and {found.num_newer} rows written since"
    lines = [f"store     {found.contents.folder}", f"position  {position}"]
    return lines + overview(found.contents, policy_version=found.version_now, top=top)


def best_rows(found: FoundStore, count: int) -> list[str]:
    """The live rows of highest advantage at collection."""
    rows = found.contents.rows
    order = np.argsort(-rows["advantages"], kind="stable")[:count]
    lines = ["", f"{'row':>8}{'advantage':>11}{'outcome':>9}{'version':>9}{'tokens':>8}  prompt"]
    for row in rows[order]:
        (first, *_) = found.contents.samples(int(row["row_ids"]))
        lines.append(
            f"{row['row_ids']:>8}{row['advantages']:>11.3g}{row['outcome']:>9.3g}"
            f"{row['policy_versions']:>9}{row['num_tokens']:>8}  {printable(first.prompt_id)}"
        )
    return lines


def rows_in_words(found: FoundStore, row_ids: Sequence[int], model: Path | None) -> list[str]:
    """Rows with their text, by the tokenizer of ``model`` (None: the run's)."""
    decode = make_decoder(tokenizer_folder(found.run) if model is None else model)
    lines: list[str] = []
    for row_id in row_ids:
        lines += [""] if lines else []
        lines += row_text(row_id, found.contents.samples(row_id), decode)
    return lines
