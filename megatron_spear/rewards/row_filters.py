"""What makes a response unfit to learn from; `row_marks` applies it to rows of trajectories.

| mark       | rule                                                              |
|------------|-------------------------------------------------------------------|
| overlong   | it used up its token budget                                       |
| void       | it neither acts nor answers (`void_answer`, `views.void_action`)  |
| repetitive | one run of 20 tokens occurs 10 times or more                      |
| unreadable | text that was decoded wrongly                                     |
"""

import re
from collections import Counter

import numpy as np
import numpy.typing as npt

from megatron_spear.rewards.graders import extract_answer

# U+FFFD, UTF-8 read as Latin-1 or Windows-1252 (a byte pair C2/C3 + 80-BF, curly quotes, the byte
# order mark, U+FFFD itself), and the classics of GBK.
_MOJIBAKE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u20ac\u0080]|\u00ef\u00bb\u00bf|\u00ef\u00bf\u00bd"
    "|\u951f\u65a4\u62f7|\u70eb\u70eb\u70eb|\u5c6f\u5c6f\u5c6f"
)


def overlong(num_tokens: int, max_tokens: int) -> bool:
    """True when a response of ``num_tokens`` (tool output included) filled its ``max_tokens``."""
    return num_tokens >= max_tokens


def void_answer(text: str, num_tool_calls: int) -> bool:
    """True when a response neither calls a tool nor ends in an answer `extract_answer` can read.

    For tasks with tools and a final answer (mathematics with a code interpreter). ``text`` is what
    the model wrote, ``num_tool_calls`` counts its calls, failed ones too.
    """
    return num_tool_calls == 0 and extract_answer(text) is None


def repetitive(tokens: npt.ArrayLike, length: int = 20, times: int = 10) -> bool:
    """True when some run of ``length`` token ids occurs ``times`` times or more, overlaps included.

    Exact, and linear in the number of tokens (each run is hashed once, as bytes).
    Example: one token repeated 29 times holds 10 equal runs of 20; 28 times, only 9.
    """
    ids = np.ascontiguousarray(tokens, np.int32)
    num_runs = len(ids) - length + 1
    if num_runs < times:
        return False
    data, size = ids.tobytes(), ids.itemsize
    runs = Counter(data[at * size : (at + length) * size] for at in range(num_runs))
    return max(runs.values()) >= times


def unreadable(text: str) -> bool:
    """True when the text holds a replacement character or a well-known trace of a wrong decoding.

    Accents, other scripts and emoji are readable; only broken ones are not.
    """
    return _MOJIBAKE.search(text) is not None
