"""The tiny model's folder loads with plain transformers; its tokenizer loses nothing."""

import filecmp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spear.config.schema import TinyModelSection
from megatron_spear.conversion.tiny_model import make_tiny_model
from megatron_spear.conversion.word_tokenizer import SIGNS, make_tokenizer
from megatron_spear.errors import CheckpointError, ConfigError

_LINES = """
You arrive at countertop On the you see a apple and mug Your task is to put some in fridge
Nothing happens go take from think on 1 2 3 12 Welcome TextWorld ALFRED
"""
WORDS = tuple(_LINES.split())
PHRASES = ("You arrive at", "you see", "Nothing happens.", "<think>")
TEXT = (
    "-= Welcome to TextWorld, ALFRED! =-\n\nYou arrive at countertop 1. On the countertop 1, "
    "you see a apple 1, and a mug 2.\n\nYour task is to: put some apple in fridge.\n"
    "Nothing happens."
)
SHAPE = TinyModelSection(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48)
NAMES = ("apple 1", "mug 1", "mug 2", "countertop 1", "countertop 12")
TOKENIZER = make_tokenizer(WORDS, PHRASES)
NAMING = make_tokenizer(WORDS, PHRASES, NAMES)
PLAIN = make_tokenizer(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", SHAPE, WORDS, PHRASES, NAMES)


def test_plain_transformers_load_it(folder):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.model_type == "qwen3" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size and len(tokenizer) % 16 == 0
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    logits = model(torch.tensor([tokenizer.encode(TEXT)])).logits
    assert 0.05 < logits.std() < 2, "a fresh model should be near uniform"


def test_the_seed_decides_every_byte(folder, tmp_path):
    again = make_tiny_model(tmp_path / "again", SHAPE, WORDS, PHRASES, NAMES)
    names = sorted(file.name for file in folder.iterdir())
    assert filecmp.cmpfiles(folder, again, names, shallow=False)[0] == names
    other = make_tiny_model(
        tmp_path / "other", SHAPE.model_copy(update={"seed": 1}), WORDS, PHRASES, NAMES
    )
    assert not filecmp.cmp(folder / "model.safetensors", other / "model.safetensors", shallow=False)


def test_standard_deviations(folder):
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.2, rel=0.1)
    up, down = (weights[f"model.layers.0.mlp.{x}_proj.weight"].std().item() for x in ("up", "down"))
    assert up == pytest.approx(32**-0.5, rel=0.1)
    assert down == pytest.approx(32**-0.5 / 2, rel=0.1)
    assert (weights["model.norm.weight"] == 1).all()


def test_heads_start_as_copying_heads(folder):
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for layer in range(SHAPE.num_layers):
        q, k, v, o = (
            weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].detach()
            for name in "qkvo"
        )
        # 4 query heads of 8 in 2 groups: heads 0 and 1 read group 0, heads 2 and 3 group 1
        for head in range(4):
            group, own = slice(head // 2 * 8, head // 2 * 8 + 8), slice(head * 8, head * 8 + 8)
            assert torch.equal(o[:, own], 0.5 * v[group].T)
            likeness = torch.cosine_similarity(q[own].flatten(), k[group].flatten(), 0).item()
            assert likeness == pytest.approx(0.5**0.5 if head % 2 == 0 else 0.0, abs=0.15)


def test_a_name_starts_near_its_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    name, word, number = (
        table[tokenizer.convert_tokens_to_ids(t)] for t in (" mug 2", " mug", " 2")
    )
    assert torch.allclose(name, (word + number) / 2**0.5)


def test_a_word_is_a_token_and_so_is_a_phrase():
    text = "you see a mug 2."
    assert PLAIN.tokenize(text) == ["you", " see", " a", " mug", " 2", "."]
    assert TOKENIZER.tokenize(text) == ["you see", " a", " mug", " 2", "."]
    assert TOKENIZER.tokenize("You arrive at fridge 1. Nothing happens.") == [
        "You arrive at", " fridge", " 1", ".", " Nothing happens.",
    ]  # fmt: skip


def test_a_name_is_a_token_behind_a_space():
    text = "take mug 2 and mug 3 on countertop 12, mug 2. mug 21"
    assert NAMING.tokenize(text) == [
        "take", " mug 2", " and", " mug", " 3", " on", " countertop 12", ",", " mug 2", ".", " mug",
        "<unk>",
    ]  # fmt: skip
    assert NAMING.tokenize("mug 2") == ["mug", " 2"]


def test_phrases_do_not_start_or_end_inside_a_word():
    assert TOKENIZER.tokenize("you seem")[0] == "you"
    assert TOKENIZER.tokenize("thyou see") == ["<unk>", " see"]


_PIECES = st.sampled_from([*WORDS, *PHRASES, *NAMES, *SIGNS, " ", "\n", "  ", "\n\n"])


@given(st.lists(_PIECES, max_size=30))
def test_decoding_gives_the_text_back(pieces):
    # Words that run into each other make an unknown word; a space keeps them apart.
    text = "".join(
        f" {piece}" if i and pieces[i - 1][-1].isalnum() and piece[0].isalnum() else piece
        for i, piece in enumerate(pieces)
    )
    for tokenizer in (TOKENIZER, PLAIN, NAMING):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_single_digits_are_tokens_of_one_form():
    counting = make_tokenizer(("take", "on"), ("take 7",), single_digits=True)
    assert counting.tokenize("take 42, on 42.5") == [
        "take", " ", "4", "2", ",", " on", " ", "4", "2", ".", "5",
    ]  # fmt: skip
    assert counting.tokenize("take 7 take 71") == ["take 7", " take", " ", "7", "1"]
    assert counting.decode(counting.encode("take 1 on 23")) == "take 1 on 23"
    with pytest.raises(ValueError, match="no digits beside single ones"):
        make_tokenizer(("12",), single_digits=True)


def test_a_further_role_is_one_token():
    calling = make_tokenizer(WORDS, roles=("tool",))
    chat = [{"role": "user", "content": "take"}, {"role": "tool", "content": "mug 2"}]
    ids = calling.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert calling.convert_ids_to_tokens(ids) == ["<|user|>", "take", "<|tool|>", "mug", " 2"]
    assert calling.decode(ids, skip_special_tokens=True) == "takemug 2"
    assert "<|tool|>" not in TOKENIZER.get_vocab()
    with pytest.raises(TemplateError, match="no such role: critic"):
        calling.apply_chat_template([{"role": "critic", "content": "take"}])


def test_unknown_words_show():
    assert TOKENIZER.decode(TOKENIZER.encode("take spaceship 1")) == "take<unk> 1"


def test_the_chat_only_grows():
    messages = [
        {"role": "system", "content": "You see"},
        {"role": "user", "content": "a mug 2.\n"},
        {"role": "assistant", "content": "take mug 2"},
        {"role": "user", "content": "Nothing happens."},
        {"role": "assistant", "content": "go to fridge 1"},
    ]

    def render(count, prompt):
        return TOKENIZER.apply_chat_template(
            messages[:count], add_generation_prompt=prompt, tokenize=True, return_dict=False
        )

    whole = render(5, False)
    assert TOKENIZER.decode(whole) == (
        "<|system|>You see<|user|>a mug 2.\n<|assistant|>take mug 2<|im_end|>"
        "<|user|>Nothing happens.<|assistant|>go to fridge 1<|im_end|>"
    )
    for count, prompt in ((2, True), (3, False), (4, True)):
        part = render(count, prompt)
        assert whole[: len(part)] == part
    answer = [*TOKENIZER.encode("take mug 2"), TOKENIZER.eos_token_id]
    assert render(2, True) + answer == render(3, False)


@pytest.mark.parametrize("change", [{"hidden_size": 36}, {"num_kv_heads": 3}])
def test_impossible_shapes_are_refused(change, tmp_path):
    with pytest.raises(ConfigError):
        make_tiny_model(tmp_path, SHAPE.model_copy(update=change), WORDS)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_is_told_and_leaves_nothing(there_before, tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    folder = tmp_path / "model"
    if there_before:
        folder.mkdir()
        (folder / "notes.txt").touch()
    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", save)
    with pytest.raises(CheckpointError, match=r"model was not written: the disk is full.*Free"):
        make_tiny_model(folder, SHAPE, WORDS)
    assert folder.exists() is there_before
    assert (folder / "notes.txt").exists() is there_before


@pytest.mark.parametrize("entry", ["", " mug", "mug "])
def test_entries_with_space_at_their_ends_are_refused(entry):
    with pytest.raises(ValueError, match="space at its ends"):
        make_tokenizer([*WORDS, entry])
