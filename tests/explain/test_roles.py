"""Roles from names in a dozen naming schemes, counts that add up, and guesses of architectures with their evidence."""

from __future__ import annotations

import pytest

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.explain.architecture import architecture, metadata
from steelyard.explain.inventory import summary
from steelyard.explain.roles import RULES, layers, role, roles, roles_of

SCHEMES = {
    "Hugging Face: Llama, with experts, quantised and adapted": {
        "model.embed_tokens.weight": (2, "embedding"),
        "model.layers.0.self_attn.q_proj.weight": (2, "attention query"),
        "model.layers.0.self_attn.k_proj.weight": (2, "attention key"),
        "model.layers.0.self_attn.v_proj.weight": (2, "attention value"),
        "model.layers.0.self_attn.o_proj.weight": (2, "attention output"),
        "model.layers.0.mlp.gate_proj.weight": (2, "MLP gate"),
        "model.layers.0.mlp.up_proj.weight": (2, "MLP up"),
        "model.layers.0.mlp.down_proj.weight": (2, "MLP down"),
        "model.layers.0.input_layernorm.weight": (1, "norm"),
        "model.norm.weight": (1, "norm"),
        "lm_head.weight": (2, "head"),
        "model.layers.0.self_attn.q_proj.bias": (1, "bias"),
        "model.layers.0.self_attn.q_norm.weight": (1, "norm"),
        "model.layers.0.mlp.gate.weight": (2, "MLP router"),
        "model.layers.3.mlp.experts.7.down_proj.weight": (2, "MLP down"),
        "model.layers.0.block_sparse_moe.experts.1.w1.weight": (2, "MLP gate"),
        "model.layers.0.block_sparse_moe.experts.1.w2.weight": (2, "MLP down"),
        "model.layers.0.block_sparse_moe.gate.weight": (2, "MLP router"),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (2, "attention qkv"),
        "model.layers.0.self_attn.kv_a_layernorm.weight": (1, "norm"),
        "model.layers.0.mlp.experts.gate_up_proj": (3, "MLP gate and up"),
        "model.layers.0.self_attn.q_proj.qweight": (2, "packed part"),
        "model.layers.0.self_attn.q_proj.weight_scale": (2, "packed part"),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, "LoRA pair"),
    },
    "Meta: Llama": {
        "tok_embeddings.weight": (2, "embedding"),
        "layers.0.attention.wq.weight": (2, "attention query"),
        "layers.0.attention.wo.weight": (2, "attention output"),
        "layers.0.feed_forward.w1.weight": (2, "MLP gate"),
        "layers.0.feed_forward.w2.weight": (2, "MLP down"),
        "layers.0.feed_forward.w3.weight": (2, "MLP up"),
        "layers.0.attention_norm.weight": (1, "norm"),
        "layers.0.ffn_norm.weight": (1, "norm"),
        "norm.weight": (1, "norm"),
        "output.weight": (2, "head"),
    },
    "Hugging Face: GPT-2": {
        "wte.weight": (2, "embedding"),
        "wpe.weight": (2, "embedding"),
        "h.0.ln_1.weight": (1, "norm"),
        "h.0.ln_1.bias": (1, "norm"),
        "h.0.attn.c_attn.weight": (2, "attention qkv"),
        "h.0.attn.c_attn.bias": (1, "bias"),
        "h.0.attn.c_proj.weight": (2, "attention output"),
        "h.0.mlp.c_fc.weight": (2, "MLP up"),
        "h.0.mlp.c_proj.weight": (2, "MLP down"),
        "h.0.mlp.c_proj.bias": (1, "bias"),
        "ln_f.weight": (1, "norm"),
        "h.0.attn.bias": (4, "other"),
    },
    "Hugging Face: BERT": {
        "bert.embeddings.word_embeddings.weight": (2, "embedding"),
        "bert.embeddings.LayerNorm.weight": (1, "norm"),
        "bert.embeddings.LayerNorm.bias": (1, "norm"),
        "bert.encoder.layer.0.attention.self.query.weight": (2, "attention query"),
        "bert.encoder.layer.0.attention.self.key.bias": (1, "bias"),
        "bert.encoder.layer.0.attention.self.value.weight": (2, "attention value"),
        "bert.encoder.layer.0.attention.output.dense.weight": (2, "attention output"),
        "bert.encoder.layer.0.attention.output.LayerNorm.weight": (1, "norm"),
        "bert.encoder.layer.0.intermediate.dense.weight": (2, "MLP up"),
        "bert.encoder.layer.0.output.dense.weight": (2, "MLP down"),
        "bert.pooler.dense.weight": (2, "linear"),
        "cls.predictions.bias": (1, "bias"),
        "cls.predictions.transform.dense.weight": (2, "head"),
        "classifier.weight": (2, "head"),
        "bert.embeddings.LayerNorm.gamma": (1, "norm"),
    },
    "Hugging Face: T5": {
        "shared.weight": (2, "embedding"),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (2, "attention query"),
        "encoder.block.0.layer.0.SelfAttention.k.weight": (2, "attention key"),
        "encoder.block.0.layer.0.SelfAttention.v.weight": (2, "attention value"),
        "encoder.block.0.layer.0.SelfAttention.o.weight": (2, "attention output"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (2, "embedding"),
        "encoder.block.0.layer.0.layer_norm.weight": (1, "norm"),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": (2, "MLP up"),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (2, "MLP gate"),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": (2, "MLP down"),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": (2, "attention query"),
        "encoder.final_layer_norm.weight": (1, "norm"),
    },
    "Hugging Face: ViT": {
        "vit.embeddings.cls_token": (3, "embedding"),
        "vit.embeddings.position_embeddings": (3, "embedding"),
        "vit.embeddings.patch_embeddings.projection.weight": (4, "convolution"),
        "vit.embeddings.patch_embeddings.projection.bias": (1, "bias"),
        "vit.encoder.layer.0.attention.attention.query.weight": (2, "attention query"),
        "vit.encoder.layer.0.attention.output.dense.weight": (2, "attention output"),
        "vit.encoder.layer.0.intermediate.dense.weight": (2, "MLP up"),
        "vit.encoder.layer.0.output.dense.weight": (2, "MLP down"),
        "vit.encoder.layer.0.layernorm_before.weight": (1, "norm"),
        "vit.layernorm.weight": (1, "norm"),
    },
    "timm: ViT": {
        "cls_token": (3, "embedding"),
        "pos_embed": (3, "embedding"),
        "patch_embed.proj.weight": (4, "convolution"),
        "blocks.0.norm1.weight": (1, "norm"),
        "blocks.0.attn.qkv.weight": (2, "attention qkv"),
        "blocks.0.attn.proj.weight": (2, "attention output"),
        "blocks.0.mlp.fc1.weight": (2, "MLP up"),
        "blocks.0.mlp.fc2.weight": (2, "MLP down"),
        "head.weight": (2, "head"),
        "head.bias": (1, "bias"),
    },
    "llama.cpp": {
        "token_embd.weight": (2, "embedding"),
        "blk.0.attn_norm.weight": (1, "norm"),
        "blk.0.attn_q.weight": (2, "attention query"),
        "blk.0.attn_k.weight": (2, "attention key"),
        "blk.0.attn_v.bias": (1, "bias"),
        "blk.0.attn_output.weight": (2, "attention output"),
        "blk.0.ffn_gate.weight": (2, "MLP gate"),
        "blk.0.ffn_up.weight": (2, "MLP up"),
        "blk.0.ffn_down_exps.weight": (3, "MLP down"),
        "blk.0.ffn_gate_inp.weight": (2, "MLP router"),
        "output_norm.weight": (1, "norm"),
        "output.weight": (2, "head"),
        "rope_freqs.weight": (1, "other"),
        "blk.0.ssm_conv1d.weight": (2, "recurrent"),
    },
    "torch": {
        "lstm.weight_ih_l0": (2, "recurrent"),
        "enc_w_ih": (2, "recurrent"),
        "dec_b_hh": (1, "bias"),
        "enc_emb": (2, "embedding"),
        "fc_w": (2, "linear"),
        "fc_b": (1, "bias"),
        "lstm.weight_hh_l1_reverse": (2, "recurrent"),
        "lstm.bias_ih_l0": (1, "bias"),
        "conv1.weight": (4, "convolution"),
        "layer1.0.bn1.running_mean": (1, "norm"),
        "layer1.0.bn1.num_batches_tracked": (0, "norm"),
        "layer1.0.downsample.1.weight": (1, "norm"),
        "layer1.0.downsample.0.weight": (4, "convolution"),
        "fc.weight": (2, "head"),
        "fc1.weight": (2, "linear"),
        "0.weight": (2, "linear"),
        "self_attn.in_proj_weight": (2, "attention qkv"),
        "self_attn.in_proj_bias": (1, "bias"),
        "self_attn.out_proj.weight": (2, "attention output"),
        "encoder.layers.0.linear1.weight": (2, "MLP up"),
        "encoder.layers.0.norm1.weight": (1, "norm"),
        "embedding.weight": (2, "embedding"),
        "features.0.weight": (4, "convolution"),
        "classifier.6.weight": (2, "head"),
    },
    "Keras": {
        "dense/kernel:0": (2, "linear"),
        "dense_1/bias:0": (1, "bias"),
        "conv2d/kernel:0": (4, "convolution"),
        "batch_normalization/gamma:0": (1, "norm"),
        "batch_normalization/moving_mean:0": (1, "norm"),
        "lstm/lstm_cell/recurrent_kernel:0": (2, "recurrent"),
        "lstm/lstm_cell/kernel:0": (2, "recurrent"),
        "embedding/embeddings:0": (2, "embedding"),
        "multi_head_attention/query/kernel:0": (3, "attention query"),
        "multi_head_attention/attention_output/kernel:0": (3, "attention output"),
        "layer_normalization/beta": (1, "norm"),
    },
    "Hugging Face: OPT": {
        "model.decoder.layers.0.fc1.weight": (2, "MLP up"),
        "model.decoder.layers.0.fc2.weight": (2, "MLP down"),
        "model.decoder.layers.0.self_attn.out_proj.weight": (2, "attention output"),
        "model.decoder.embed_positions.weight": (2, "embedding"),
    },
    "Hugging Face: GPT-NeoX": {
        "gpt_neox.layers.0.attention.query_key_value.weight": (2, "attention qkv"),
        "gpt_neox.layers.0.attention.dense.weight": (2, "attention output"),
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (2, "MLP up"),
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": (2, "MLP down"),
        "embed_out.weight": (2, "head"),
        "gpt_neox.embed_in.weight": (2, "embedding"),
    },
}
NAMES = [
    pytest.param(name, *wanted, id=f"{name} {wanted[0]}")
    for names in SCHEMES.values()
    for name, wanted in names.items()
]


def unread(shapes: dict[str, tuple[int, ...]], ties: dict[str, str] | None = None, **meta: str) -> Weights:
    """Weights of which nothing may be read."""
    items = [Weight(name, Spec.of(shape, "float32"), lambda: pytest.fail("read"), 4) for name, shape in shapes.items()]
    return Weights(items, ties, meta)


@pytest.mark.parametrize(("name", "rank", "wanted"), NAMES)
def test_a_name_tells_its_role(name: str, rank: int, wanted: str) -> None:
    assert role(name, rank) == wanted


def test_every_role_is_met_in_some_scheme() -> None:
    met = {wanted for names in SCHEMES.values() for _, wanted in names.values()}
    assert {rule.role for rule in RULES} <= met


@pytest.mark.parametrize(
    "name", ["", "x", "a.b.c", "weights", "\x1b[2J", "mlp." * 10**6, "conv" * 10**6 + ".weight", "1." * 10**6]
)
def test_what_no_library_writes_is_other_and_takes_no_time(name: str) -> None:
    assert role(name, 2) == "other"
    assert layers(unread({name: (2, 2)})).rows


def test_roles_and_layers_add_up_to_the_totals_and_count_ties_once() -> None:
    shapes = {"wte.weight": (9, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    shapes |= {f"h.{i}.{part}": (4, 12) for i in range(3) for part in ("attn.c_attn.weight", "mlp.c_fc.weight")}
    shapes["h.2.more"] = (7,)
    weights = unread(shapes, {"lm_head.weight": "wte.weight"})
    total = summary(weights).rows[0]
    for table in (roles(weights), layers(weights)):
        for column in ("tensors", "elements", "bytes", "stored"):
            assert sum(table.column(column)) == total[column]
        assert sum(table.column("tied")) == 1
        assert sum(table.column("share")) == pytest.approx(1)
    assert roles(weights).column("role") == ["embedding", "norm", "attention qkv", "MLP up", "other", "head"]
    assert roles(weights).rows[-1]["tensors"] == 0
    assert [(row["layers"], row["count"]) for row in layers(weights).rows] == [
        ("h.{0..1}", 2),
        ("h.2", 1),
        ("(outside of layers)", None),
    ]


def test_ties_are_counted_in_the_layers_of_their_own_names() -> None:
    weights = unread({f"h.{i}.w": (2,) for i in range(3)}, {f"h.{i}.again": "h.0.w" for i in range(3)})
    assert [(row["layers"], row["tensors"], row["tied"]) for row in layers(weights).rows] == [("h.{0..2}", 3, 3)]


def test_a_thousand_unlike_layers_are_added_up_at_the_end() -> None:
    weights = unread({f"h.{i}.w": (i + 1,) for i in range(1000)})
    table = layers(weights)
    assert len(table.rows) == 101
    assert table.rows[-1]["layers"] == "(900 others)"
    assert sum(table.column("elements")) == weights.size


FAMILIES = {
    "Hugging Face: GPT-2": "GPT-2",
    "Hugging Face: BERT": "BERT",
    "Hugging Face: T5": "T5",
    "Hugging Face: ViT": "vision transformer, in the names of Hugging Face",
    "timm: ViT": "vision transformer, in the names of timm",
    "llama.cpp": "transformer, in the names of llama.cpp",
    "Meta: Llama": "Llama, in the names of Meta",
    "Hugging Face: OPT": "OPT",
    "Hugging Face: GPT-NeoX": "GPT-NeoX (Pythia)",
}


@pytest.mark.parametrize("scheme", FAMILIES)
def test_names_tell_the_family_and_are_the_evidence(scheme: str) -> None:
    weights = unread({name: (2,) * rank for name, (rank, _) in SCHEMES[scheme].items()})
    row = architecture(weights).rows[0]
    assert row["family"] == FAMILIES[scheme]
    shown = [text for text in row["evidence"].split("'") if text in weights]
    assert shown


LLAMA = ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "input_layernorm.weight")


@pytest.mark.parametrize(
    ("names", "family"),
    [
        ((), "Llama or Mistral, whose names agree"),
        (("self_attn.q_norm.weight",), "Qwen 3"),
        (("self_attn.q_proj.bias",), "Qwen 2"),
        (("pre_feedforward_layernorm.weight",), "Gemma 2 or 3"),
        (("mlp.experts.0.up_proj.weight",), "Llama with experts (Qwen-MoE and others)"),
        (("block_sparse_moe.experts.0.w1.weight",), "Mixtral (Mistral with experts)"),
        (("self_attn.kv_a_proj_with_mqa.weight",), "DeepSeek (latent attention)"),
    ],
)
def test_relatives_of_llama_are_told_apart(names: tuple[str, ...], family: str) -> None:
    weights = unread({f"model.layers.{i}.{name}": (8,) for i in range(2) for name in (*LLAMA, *names)})
    assert architecture(weights).rows[0]["family"] == family


@pytest.mark.parametrize(
    ("shapes", "family", "evidence"),
    [
        ({"rnn.weight_ih_l0": (32, 5), "rnn.weight_hh_l0": (32, 8)}, "LSTM", "4 gates of 8"),
        ({"rnn.weight_ih_l0": (24, 5), "rnn.weight_hh_l0": (24, 8)}, "GRU", "3 gates of 8"),
        ({"lstm/lstm_cell/recurrent_kernel:0": (8, 32)}, "LSTM", "4 gates of 8"),
        ({"enc_emb": (29, 8), "enc_w_ih": (24, 8), "enc_w_hh": (24, 8)}, "GRU", "3 gates of 8"),
        ({"a.weight_hh_l0": (8, 8)}, "plain recurrent network", "1 gates of 8"),
        ({"conv1.weight": (4, 1, 3, 3), "fc.weight": (2, 9)}, "convolutional network", "'conv1.weight'"),
        ({"0.weight": (9, 4), "0.bias": (9,), "2.weight": (2, 9)}, "perceptron of 2 matrices", "4 → 9 → 2"),
        ({"dense/kernel:0": (4, 9), "dense_1/kernel:0": (9, 2)}, "perceptron of 2 matrices", "4 → 9 → 2"),
        ({"head.weight": (2, 30), "head.bias": (2,)}, "linear model", "30 → 2"),
        ({"0.weight": (9, 4), "2.weight": (2, 8)}, "unknown", "no rule"),
        ({"x": (3, 3, 3)}, "unknown", "no rule"),
        ({}, "unknown", "no rule"),
    ],
)
def test_shapes_tell_what_names_do_not(shapes: dict[str, tuple[int, ...]], family: str, evidence: str) -> None:
    row = architecture(unread(shapes)).rows[0]
    assert row["family"] == family
    assert evidence in row["evidence"]


def test_sizes_are_told_where_they_can_be() -> None:
    shapes = {"wte.weight": (50, 8), "ln_f.weight": (8,)} | {f"h.{i}.ln_1.weight": (8,) for i in range(3)}
    row = architecture(unread(shapes)).rows[0]
    assert (row["layers"], row["width"], row["vocabulary"]) == (3, 8, 50)
    assert list(architecture(unread({"a": (2,)})).rows[0].values())[-3:] == [None, None, None]


@pytest.mark.parametrize(
    ("shape", "norm", "sizes"),
    [
        ((100, 256), 256, (256, 100)),
        ((256, 100), 256, (256, 100)),  # turned round
        ((100, 256), None, (256, 100)),
        ((300, 128), 768, (768, 300)),  # projected from 128 to 768, as in ALBERT
        ((64, 64), 64, (64, 64)),
    ],
)
def test_a_vocabulary_may_be_smaller_than_the_width(
    shape: tuple[int, int], norm: int | None, sizes: tuple[int, int]
) -> None:
    norms = {} if norm is None else {f"h.{i}.ln_1.weight": (norm,) for i in range(3)}
    row = architecture(unread({"wte.weight": shape} | norms)).rows[0]
    assert (row["width"], row["vocabulary"]) == sizes


def test_what_the_metadata_say_is_repeated_and_counts_where_nothing_else_says_anything() -> None:
    row = architecture(unread({"x": (1, 2, 3)}, **{"config.model_type": "llama\x1b"})).rows[0]
    assert row["family"] == "llama\\x1b"
    assert "the metadata say config.model_type = 'llama\\x1b'" in row["evidence"]
    assert architecture(unread({"x": (1, 2, 3)}, **{"general.architecture": "llama"})).rows[0]["family"] == "llama"
    assert architecture(unread({"x": (1, 2, 3)}, **{"general.architecture": "unknown"})).rows[0]["family"] == "unknown"
    row = architecture(unread({"0.weight": (9, 4), "2.weight": (2, 9)}, **{"general.architecture": "llama"})).rows[0]
    assert row["family"] == "perceptron of 2 matrices"


def test_metadata_are_a_table_whose_values_are_cut_for_reading() -> None:
    assert metadata(unread({})) is None
    weights = unread({}, short="a", long="b" * 1000)
    assert [row["value"] for row in metadata(weights).rows] == ["a", "b" * 1000]
    assert metadata(weights, 10).rows[1]["value"] == "b" * 10 + "… (1000 characters)"


def test_a_role_is_found_for_every_name_and_tie() -> None:
    weights = unread({"wte.weight": (3, 2)}, {"lm_head.weight": "wte.weight"})
    assert roles_of(weights) == {"wte.weight": "embedding", "lm_head.weight": "head"}
