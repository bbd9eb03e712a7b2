"""Token in, token out: what is sampled is never tokenised again, whatever the template does."""

import pytest

from megatron_spear.errors import ConfigError
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.testing.fakes import CHATML, ROLE_TOKENS, answer_text, word_tokenizer

WORDS = ["walk", "to", "look", "a", "desk", "mug", "<think>", "</think>", "hm"]

# Like Qwen3's: answers in the past lose their thoughts.
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
# Like Qwen2.5's: a default system message.
WITH_SYSTEM = "<|im_start|>system\nlook<|im_end|>\n" + CHATML


def _user(content):
    return {"role": "user", "content": content}


def _assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("template", [CHATML, ROLE_TOKENS, WITH_SYSTEM])
def test_extended_turns_equal_the_template_rendered_whole(template):
    tokenizer = word_tokenizer(WORDS, template)
    renderer = ChatRenderer(tokenizer)
    tokens = list(renderer.initial([_user("walk to a desk")]))
    chat = [_user("walk to a desk")]
    for answer, seen in (("look", "a mug\na desk"), ("walk to mug", "a mug"), ("look", "a")):
        action = answer_text(tokenizer, answer)
        tokens += [*action, *renderer.extend(action, [_user(seen)])]
        chat += [_assistant(answer), _user(seen)]
    assert tokens == renderer.initial(chat).tolist()
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(tokens)


def test_a_tokenizer_that_adds_to_its_compiled_part_is_asked_itself():
    tokenizer = word_tokenizer(WORDS, CHATML)

    class Longer(type(tokenizer)):
        def encode(self, text, **settings):
            return [*super().encode(text, **settings), 1]

    plain = ChatRenderer(tokenizer).initial([_user("look")])
    tokenizer.__class__ = Longer
    assert ChatRenderer(tokenizer).initial([_user("look")]).tolist() == [*plain, 1]


@pytest.mark.parametrize(
    ("template", "glue"),
    [
        (CHATML, "\n <|im_start|> user \n desk <|im_end|> \n <|im_start|> assistant \n"),
        (ROLE_TOKENS, "<|user|> desk <|assistant|>"),
    ],
)
def test_the_end_token_is_added_where_an_action_was_cut(template, glue):
    tokenizer = word_tokenizer(WORDS, template)
    renderer = ChatRenderer(tokenizer)
    whole = answer_text(tokenizer, "look a")
    expected = glue.split(" ")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(renderer.extend(whole, [_user("desk")])) == expected
    assert renderer.extend(whole[:-1], [_user("desk")]).tolist() == [
        end,
        *renderer.extend(whole, [_user("desk")]).tolist(),
    ]


def test_a_template_that_rewrites_history_keeps_the_sampled_tokens():
    tokenizer = word_tokenizer(WORDS, FORGETFUL)
    renderer = ChatRenderer(tokenizer)
    thought = "<think> hm </think> look"
    first = renderer.initial([_user("desk")])
    action = answer_text(tokenizer, thought)
    tokens = [*first, *action, *renderer.extend(action, [_user("mug")])]
    rendered = renderer.initial([_user("desk"), _assistant(thought), _user("mug")])
    assert "hm" not in tokenizer.convert_ids_to_tokens(rendered)
    assert tokens[: len(first) + len(action)] == [*first, *action]
    plain = answer_text(tokenizer, "look")
    assert (
        tokens[-len(renderer.extend(plain, [_user("mug")])) :]
        == renderer.extend(plain, [_user("mug")]).tolist()
    )


def test_tokens_that_do_not_survive_a_round_trip_stay_as_sampled():
    """Two tokens whose text would be tokenised as one: extend gives only what is new."""
    tokenizer = word_tokenizer([*WORDS, "des", "##k"], CHATML)
    renderer = ChatRenderer(tokenizer)
    sampled = tokenizer.convert_tokens_to_ids(["des", "##k", "<|im_end|>"])
    assert renderer.decode_action(sampled) == "desk"
    assert tokenizer.encode("desk", add_special_tokens=False) != sampled[:2]
    new = renderer.extend(sampled, [_user("mug")])
    assert not set(sampled[:2]) & set(new.tolist())


def test_stop_tokens_and_decoding():
    tokenizer = word_tokenizer(WORDS, CHATML)
    renderer = ChatRenderer(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.stop_token_ids == (end,)
    assert renderer.decode_action(answer_text(tokenizer, "walk to desk")) == "walk to desk"
    assert renderer.encode_action("walk to").tolist() == answer_text(tokenizer, "walk to").tolist()
    tokenizer.eos_token = "<unk>"
    other = ChatRenderer(tokenizer)
    unk = tokenizer.convert_tokens_to_ids("<unk>")
    assert other.encode_action("walk")[-1] == other.end_token_id == end
    assert other.stop_token_ids == tuple(sorted((unk, end)))
    # Ended by the other stop token: the template's own end still closes the turn.
    assert other.extend([unk], [_user("mug")])[0] == end


def test_byte_level_bpe_as_in_qwen():
    """With a byte-level tokenizer the glue's tokens are the template's as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "\nuser\nYou see a mug.\n\nassistant\ngo to desk 1\n"
    tokenizer.train_from_iterator([text] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    renderer = ChatRenderer(wrapped)
    chat = [_user("You see a mug.\n"), _assistant("go to desk 1"), _user("  \nYou see ça.\n\n")]
    action = answer_text(wrapped, "go to desk 1")
    tokens = [*renderer.initial(chat[:1]), *action, *renderer.extend(action, [chat[2]])]
    assert tokens == renderer.initial(chat).tolist()
    assert renderer.decode_action(action) == "go to desk 1"


def test_unusable_templates_are_refused():
    tokenizer = word_tokenizer(WORDS, CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatRenderer(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ConfigError, match="as they are"):
        ChatRenderer(tokenizer)
