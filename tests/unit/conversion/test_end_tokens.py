"""The model's own end tokens: read from its folder, and stops of what is drawn for a chat."""

import json
from types import SimpleNamespace

import pytest

from megatron_spear.conversion.end_tokens import end_token_ids
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.fakes import CHATML
from megatron_spear.testing.templates import byte_tokenizer
from megatron_spear.trainer.build import make_renderer

CONFIG = SimpleNamespace(eos_token_id=3, vocab_size=10)


def _generation_config(folder, text):
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{"eos_token_id": [4, 5]}', {3, 4, 5}),
        ('{"eos_token_id": 4, "temperature": 0.6}', {3, 4}),
        ('{"eos_token_id": null}', {3}),
        ("{}", {3}),
        ('{"eos_token_id": [9, 10, -1]}', {3, 9}),
    ],
)
def test_both_files_name_end_tokens_of_the_vocabulary(tmp_path, said, expected):
    assert end_token_ids(tmp_path, CONFIG) == {3}, "without a generation_config.json"
    _generation_config(tmp_path, said)
    assert end_token_ids(tmp_path, CONFIG) == expected
    assert end_token_ids(tmp_path, SimpleNamespace()) >= expected - {3}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('{"eos_token_id": "</s>"}', r"eos_token_id in .*generation_config.json is '</s>'"),
        ('{"eos_token_id": [1, true]}', "expected a token id"),
        ("[]", "no JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_no_id_is_named(tmp_path, said, why):
    _generation_config(tmp_path, said)
    with pytest.raises(CheckpointError, match=why):
        end_token_ids(tmp_path, CONFIG)


def test_answers_stop_at_each_of_them(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path)
    end, call_end, text_end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")
    )
    config = {"model_type": "qwen3", "vocab_size": len(tokenizer), "eos_token_id": end}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert make_renderer(tmp_path).stop_token_ids == (end,)
    _generation_config(tmp_path, json.dumps({"eos_token_id": [call_end, text_end]}))
    renderer = make_renderer(tmp_path)
    assert renderer.stop_token_ids == tuple(sorted((end, call_end, text_end)))
    assert renderer.end_token_id == end, "demonstrations end as the template says"
    tokens = renderer.extend([call_end], [{"role": "user", "content": "b"}])
    assert tokens[0] == end, "so does a turn that another token ended"
