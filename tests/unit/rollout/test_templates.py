"""Tools and replies as real chat templates show them, and what is done where they cannot."""

import json

import pytest

from megatron_spear.errors import ConfigError
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.templates import ChatTemplate, describe_tools
from megatron_spear.testing.fakes import CHATML, ROLE_TOKENS, answer_text
from megatron_spear.testing.market_environment import MarketView
from megatron_spear.testing.templates import byte_tokenizer, trl_template

TOOLS = MarketView().tools
CALL = '<tool_call>\n{"name": "price", "arguments": {"item": "fig"}}\n</tool_call>'
STRICT = (  # like Mistral's: a reply needs the call before it as a field
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no call') }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")


def _said(role, content):
    return {"role": role, "content": content}


def _tokenizer(name):
    template = trl_template(name)
    if template is None:
        pytest.skip("the package trl is not installed (pip install --no-deps trl)")
    return byte_tokenizer(template, end="<|eot_id|>" if "llama" in name else "<|im_end|>")


def _text(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=False)


def _shown(tool):
    return json.dumps(tool, ensure_ascii=False)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1"])
def test_a_template_with_tools_lists_them_itself(name):
    tokenizer = _tokenizer(name)
    renderer = ChatRenderer(tokenizer)
    chat = [_said("system", "Be brief."), _said("user", "What does a fig cost?")]
    text = _text(tokenizer, renderer.initial(chat, TOOLS))
    whole = tokenizer.apply_chat_template(
        chat, tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    assert text == whole and '"multiply"' in text and "These tools can be called" not in text
    assert '"multiply"' not in _text(tokenizer, renderer.initial(chat))


@pytest.mark.parametrize("template", [CHATML, ROLE_TOKENS, DROPS])
def test_a_template_without_tools_gets_them_in_the_system_message(template):
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer)
    user = _said("user", "What does a fig cost?")
    for system, expected in (
        ([_said("system", "Be brief.")], f"Be brief.\n\n{describe_tools(TOOLS)}"),
        ([], describe_tools(TOOLS)),
    ):
        described = [_said("system", expected), user]
        tokens = renderer.initial([*system, user], TOOLS)
        assert tokens.tolist() == renderer.initial(described).tolist()
        assert all(_shown(tool) in _text(tokenizer, tokens) for tool in TOOLS)


def test_a_template_without_a_system_role_gets_it_all_in_the_users_message():
    template = ChatTemplate(byte_tokenizer(STRICT))
    text = template.render([_said("system", "Be brief."), _said("user", "hi")], TOOLS)
    told = f"Be brief.\n\n{describe_tools(TOOLS)}\n\nhi"
    assert text == f"<|im_start|>user\n{told}<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([_said("system", "a")]).startswith("<|im_start|>user\na<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, ROLE_TOKENS, DROPS, STRICT])
def test_a_template_without_a_tool_role_gets_replies_in_a_users_message(template):
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer)
    action = answer_text(tokenizer, CALL)
    tokens = renderer.extend(action, [_said("tool", "17"), _said("tool", "4")])
    told = "<tool_response>\n17\n</tool_response>\n<tool_response>\n4\n</tool_response>"
    assert tokens.tolist() == renderer.extend(action, [_said("user", told)]).tolist()
    chat = [_said("user", "a"), _said("assistant", "b"), _said("tool", "4"), _said("user", "c")]
    told = "<tool_response>\n4\n</tool_response>"
    plain = [*chat[:2], _said("user", told), chat[3]]
    assert renderer.initial(chat).tolist() == renderer.initial(plain).tolist()


REPLIES = [
    ["59"],
    ["59", '{"a": "b"}'],
    ["  spaces kept \n", "", "\n<tool_response>"],
    ["ça \u202e \x00 \N{GRINNING FACE}", "\\n \"quoted\" 'too'"],
]


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3", "gemma"]
)
@pytest.mark.parametrize("replies", REPLIES)
def test_replies_equal_the_template_rendered_whole(name, replies):
    """Several messages a turn; the answer is one that the template leaves as it is."""
    tokenizer = _tokenizer(name)
    if name == "gemma":
        tokenizer.add_special_tokens({"eos_token": "<end_of_turn>"})
    renderer = ChatRenderer(tokenizer)
    chat = [_said("user", "What does a fig cost?")]
    tokens = renderer.initial(chat, TOOLS).tolist()
    for _ in range(2):
        action = answer_text(tokenizer, "It is 3.")
        new = [_said("tool", reply) for reply in replies]
        tokens += [*action, *renderer.extend(action, new)]
        chat += [_said("assistant", "It is 3."), *new]
    assert _text(tokenizer, tokens) == _text(tokenizer, renderer.initial(chat, TOOLS))


@pytest.mark.parametrize("name", ["llama3_1", "llama3"])
def test_a_template_that_trims_or_quotes_is_followed(name):
    tokenizer = _tokenizer(name)
    renderer = ChatRenderer(tokenizer)
    action = answer_text(tokenizer, "a")
    trimmed = _text(tokenizer, renderer.extend(action, [_said("user", " \n a desk \n")]))
    assert "\n\na desk<|eot_id|>" in trimmed
    replied = _text(tokenizer, renderer.extend(action, [_said("tool", 'say "59"\n')]))
    quoted = json.dumps('say "59"\n')
    assert (f"ipython<|end_header_id|>\n\n{quoted}<|eot_id|>" in replied) == (name == "llama3_1")


def test_the_glue_of_a_sequence_of_roles_is_found_once(monkeypatch):
    tokenizer = byte_tokenizer(CHATML)
    renderer = ChatRenderer(tokenizer)
    first = renderer.extend([], [_said("user", "a"), _said("user", "b")])
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", None)
    again = renderer.extend([], [_said("user", "a"), _said("user", "b")])
    assert first.tolist() == again.tolist()


def test_a_template_that_refuses_a_second_turn_is_named():
    single = "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    with pytest.raises(ConfigError, match=r"refuses messages of roles user .*one only"):
        ChatRenderer(byte_tokenizer(single + CHATML))


# Like GLM's: the next role's token is what ends an answer.
ROLE_ENDS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|eot_id|>\n<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% elif m.role == 'assistant' %}<|im_start|>{{ m.content }}"
    "{% else %}<|begin_of_text|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize(
    ("roles", "end", "glue"),
    [
        (("user",), "<|begin_of_text|>", "\nc0<|im_start|>"),
        (("tool",), "<|eot_id|>", "\n<tool_response>\nc0\n</tool_response><|im_start|>"),
        (
            ("tool", "user"),
            "<|eot_id|>",
            "\n<tool_response>\nc0\n</tool_response><|begin_of_text|>\nc1<|im_start|>",
        ),
    ],
)
def test_the_next_role_may_decide_what_ends_an_answer(roles, end, glue):
    tokenizer = byte_tokenizer(ROLE_ENDS)
    renderer = ChatRenderer(tokenizer)
    assert _text(tokenizer, [renderer.end_token_id]) == "<|begin_of_text|>"
    new = [_said(role, f"c{number}") for number, role in enumerate(roles)]
    for last in ("x", "<|im_end|>"):
        action = tokenizer.encode(last, add_special_tokens=False)
        assert _text(tokenizer, renderer.extend(action, new)) == end + glue
    action = tokenizer.encode("x" + end, add_special_tokens=False)
    assert _text(tokenizer, renderer.extend(action, new)) == glue
