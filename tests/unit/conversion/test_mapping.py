"""Weight maps: hand numbers, and both directions undo each other for every family and split."""

import pytest
import torch
import transformers

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import GatedMap, QkvMap, VocabMap
from megatron_spear.conversion.shape import model_shape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.errors import ConfigError

SMALL = {
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def test_qkv_by_hand() -> None:
    item = QkvMap(
        target="t", sources=("q", "k", "v"), shapes=((4,), (2,), (2,)), groups=2, head_dim=1
    )
    assert [part.tolist() for part in item.to_hf(torch.tensor([3, 4, 12, 22]))] == [
        [3, 4],
        [12],
        [22],
    ]
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([11, 12]), torch.tensor([21, 22])
    full = item.to_megatron([q, k, v])
    assert full.tolist() == [1, 2, 11, 21, 3, 4, 12, 22]
    assert item.part([q, k, v], 1, 2).tolist() == [3, 4, 12, 22]
    ((offset, piece),) = item.pieces([q, k, v], 1, 2)
    assert offset == (4,) and piece.tolist() == [3, 4, 12, 22]
    assert [part.tolist() for part in item.to_hf(full)] == [q.tolist(), k.tolist(), v.tolist()]


def test_gated_by_hand() -> None:
    item = GatedMap(target="t", sources=("gate", "up"), shapes=((2,), (2,)))
    sources = [torch.tensor([1, 2]), torch.tensor([11, 12])]
    full = item.to_megatron(sources)
    assert item.part(sources, 0, 2).tolist() == [1, 11]
    found = [(offset, piece.tolist()) for offset, piece in item.pieces(sources, 1, 2)]
    assert found == [((1,), [2]), ((3,), [12])]
    assert item.unshard([torch.tensor([1, 11]), torch.tensor([2, 12])]).tolist() == full.tolist()


def test_vocabulary_is_padded_and_cut() -> None:
    item = VocabMap(target="t", sources=("e",), shapes=((3, 1),), stage="first")
    full = torch.tensor([[1], [2], [3]])
    assert padded_vocab(3, 2) == 4
    assert item.part([full], 1, 2).tolist() == [[3], [0]]
    assert item.unshard([item.part([full], r, 2) for r in (0, 1)]).tolist() == full.tolist()
    assert item.part([full], 3, 4).tolist() == [[0]]


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_table_covers_the_model_both_ways(family: str, tied: bool, size: int) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL | {"tie_word_embeddings": tied})
    with torch.random.fork_rng():
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    table = weight_table(model_shape(config))
    targets = [item.local_name(0) for item in table]
    assert len(set(targets)) == len(targets)
    seen: list[str] = []
    for item in table:
        sources = [state[name] for name in item.sources]
        assert [tuple(s.shape) for s in sources] == [tuple(s) for s in item.shapes]
        full = item.to_megatron(sources)
        assert tuple(full.shape) == item.full_shape
        back = item.to_hf(item.unshard([item.part(sources, rank, size) for rank in range(size)]))
        assert all(torch.equal(a, b) for a, b in zip(sources, back, strict=True))
        whole = torch.full((padded_vocab(len(full), size), *full.shape[1:]), torch.nan)
        for rank in range(size):
            for offset, piece in item.pieces(sources, rank, size):
                region = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                assert whole[region].isnan().all(), "pieces do not overlap"
                whole[region] = piece
        assert torch.equal(whole[: len(full)], full) and not whole.isnan().any()
        seen += () if item.tied else item.sources
    assert sorted(seen) == sorted(state)


def test_local_names_count_from_the_stage() -> None:
    table = weight_table(model_shape(transformers.Qwen3Config(**SMALL)))
    second = next(item for item in table if item.layer == 1)
    assert second.local_name(1).startswith("decoder.layers.0.")


def test_an_expert_has_its_place_on_the_rank_that_holds_it() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    table = weight_table(model_shape(transformers.Qwen3MoeConfig(**SMALL, **experts)))
    names = {item.sources: item.local_name(1, 2) for item in table if item.layer == 1}
    experts_of_layer = "model.layers.1.mlp.experts."
    down, gate, up = (experts_of_layer + f"3.{x}_proj.weight" for x in ("down", "gate", "up"))
    place = "decoder.layers.0.mlp.experts.local_experts.1."
    assert names[down,] == place + "linear_fc2.weight"
    assert names[gate, up] == place + "linear_fc1.weight"
    assert names["model.layers.1.mlp.gate.weight",] == "decoder.layers.0.mlp.router.weight"
    assert sum(name.startswith(experts_of_layer) for names in names for name in names) == 4 * 3


def test_unsupported_models_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'gpt2'.*qwen3, qwen3_moe, qwen2, llama"):
        model_shape(transformers.GPT2Config())
    with pytest.raises(ConfigError, match="mlp_bias"):
        model_shape(transformers.LlamaConfig(mlp_bias=True))
    with pytest.raises(ConfigError, match="use_sliding_window"):
        model_shape(transformers.Qwen2Config(use_sliding_window=True))
    with pytest.raises(ConfigError, match=r"mlp_only_layers \[1\].*decoder_sparse_step 2"):
        model_shape(transformers.Qwen3MoeConfig(mlp_only_layers=[1], decoder_sparse_step=2))
    with pytest.raises(ConfigError, match=r"num_experts_per_tok 8 .*num_experts 4"):
        model_shape(transformers.Qwen3MoeConfig(num_experts=4))
    with pytest.raises(ConfigError, match="norm_topk_prob with one expert a token"):
        model_shape(transformers.Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True))
    with pytest.raises(ConfigError, match="rope_type 'dynamic'"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model_shape(transformers.LlamaConfig(rope_parameters=rope))
