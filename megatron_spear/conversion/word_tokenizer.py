"""A word-level tokenizer over a closed word list that gives back every text it can read.

Each word, sign and phrase has two tokens, with and without a leading space, so that decoding is
plain concatenation: ``You see a mug 2.`` is ``You``, `` see``, `` a``, `` mug``, `` 2``, ``.``.
With ``mug 2`` as a name, `` mug 2`` is one token. With single digits, each digit is one token of
one form, so that a number is copied digit by digit: `` 42`` is the space, ``4``, ``2``.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

PAD, END = "<|pad|>", "<|im_end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT, UNKNOWN)
SIGNS = tuple(".,:;!?'\"()[]<>{}-=+*/_&%$#@`|\\")

# A message is its role's token and its content; only what the assistant says has an end. What is
# rendered for k messages is a prefix of what is rendered for k + 1.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORD, _LETTERS = "[A-Za-z0-9]+", "[A-Za-z]+"
DIGITS = tuple("0123456789")
# The vocabulary's size divides by this, so that tensor-parallel ranks share it out evenly.
_SIZE_MULTIPLE = 16


def vocabulary(
    words: Sequence[str],
    phrases: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    roles: Sequence[str] = (),
    single_digits: bool = False,
) -> dict[str, int]:
    """Token -> id: special tokens, whitespace, signs, words and phrases in both forms, names.

    Entries of ``words`` that are not plain words (``<think>``, ``pick-up``) count as phrases.
    ``roles`` are those of messages beside system, user and assistant. The size is a multiple of 16,
    filled up with reserved tokens.
    """
    tokens = [*SPECIAL_TOKENS, *(f"<|{role}|>" for role in roles), " ", "\n"]
    tokens += DIGITS if single_digits else ()
    for entry in dict.fromkeys((*SIGNS, *words, *phrases)):
        if not entry or entry != entry.strip():
            raise ValueError(f"vocabulary entry {entry!r}: expected text without space at its ends")
        if single_digits and re.fullmatch(_WORD, entry) and not re.fullmatch(_LETTERS, entry):
            raise ValueError(f"vocabulary entry {entry!r}: expected no digits beside single ones")
        tokens += [entry, f" {entry}"]
    tokens += [f" {name}" for name in dict.fromkeys(names)]
    reserved = -len(tokens) % _SIZE_MULTIPLE
    tokens += [f"<|reserved_{i}|>" for i in range(reserved)]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer(
    words: Sequence[str],
    phrases: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    roles: Sequence[str] = (),
    single_digits: bool = False,
) -> Any:
    """A ``PreTrainedTokenizerFast`` with a chat template.

    ``phrases`` are pieces of several words that become one token wherever they stand as a whole,
    the longest first. ``names`` are a word and a number (``mug 2``), one token behind a space.
    ``roles`` are further roles of messages (``tool``), one token each. Text of other words decodes
    with ``<unk>`` in their place.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = vocabulary(words, phrases, names, roles=roles, single_digits=single_digits)
    long = [entry for entry in (*words, *phrases) if not re.fullmatch(_WORD, entry)]
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(_pattern(long, names, single_digits)), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    own = {*SPECIAL_TOKENS, *(f"<|{role}|>" for role in roles)}
    special = [token for token in vocab if token in own or "<|reserved_" in token]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        chat_template=_only_roles(roles) + CHAT_TEMPLATE if roles else CHAT_TEMPLATE,
    )


def _only_roles(roles: Sequence[str]) -> str:
    """The start of a template that refuses other roles, so that it is known to have these."""
    known = ["system", "user", "assistant", *roles]
    return (
        f"{{% for message in messages %}}{{% if message['role'] not in {known} %}}"
        "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}{% endfor %}"
    )


def _pattern(phrases: Sequence[str], names: Sequence[str], single_digits: bool) -> str:
    """The regular expression of one piece: phrase, name, word, sign, with its space; or space."""
    pieces = []
    for phrase in sorted(dict.fromkeys(phrases), key=len, reverse=True):
        start = "(?<![A-Za-z0-9])" if phrase[0].isalnum() else ""
        end = "(?![A-Za-z0-9])" if phrase[-1].isalnum() else ""
        pieces.append(f" ?{start}{re.escape(phrase)}{end}")
    numbers = defaultdict(list)
    for name in names:
        word, number = name.split(" ")
        numbers[word].append(number)
    pieces += [f" {word} (?:{'|'.join(n)})(?![A-Za-z0-9])" for word, n in numbers.items()]
    word = f" ?{_LETTERS}|[0-9]" if single_digits else f" ?{_WORD}"
    return "|".join([*pieces, word, r" ?[^\sA-Za-z0-9]", r"\s"])
