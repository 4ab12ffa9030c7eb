"""The verb ``score``: a file of evidence, and what it refuses before it works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steelyard import formats
from steelyard.cli import main


@pytest.fixture
def weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "w.safetensors"
    assert main(["train", "digits", str(path), "--epochs", "1"]) == 0
    capsys.readouterr()
    return path


@pytest.mark.parametrize("kind", ["hessian", "norms", "moments", "fisher", "gradient", "taylor"])
def test_each_kind_is_a_file_of_the_names_of_the_weights(weights: Path, kind: str, capsys) -> None:
    target = weights.with_name("e.safetensors")
    assert main(["score", "digits", str(weights), str(target), "--kind", kind, "--batches", "2", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out.splitlines()[0])["rows"]}
    found = formats.open(target)
    assert set(found) == names
    assert names <= set(formats.open(weights))
    assert json.loads(found.meta["evidence"])["kind"] == kind


def test_what_is_there_is_not_replaced_and_other_weights_do_not_fit(weights: Path, capsys) -> None:
    target = weights.with_name("e.safetensors")
    target.write_text("mine")
    assert main(["score", "digits", str(weights), str(target)]) == 2
    assert target.read_text() == "mine"
    assert main(["score", "breast-cancer", str(weights), str(weights.with_name("new.safetensors"))]) == 2
    assert main(["score", "digits", str(weights), str(weights.with_name("new.safetensors")), "--where", "no*"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "nothing chooses a weight matrix" in lines[2]
    assert not weights.with_name("new.safetensors").exists()


def test_what_pairs_cost_is_measured_and_used(weights: Path, capsys) -> None:
    evidence, refused = weights.with_name("pairs.safetensors"), weights.with_name("no.safetensors")
    command = ["score", "digits", str(weights), "--kind", "kronecker"]
    assert main([*command, str(evidence), "--batches", "4"]) == 0
    names = set(formats.open(weights))
    assert set(formats.open(evidence)) == {f"{name}|{side}" for name in names for side in ("outputs", "inputs")}
    assert shrunk(weights, "--method", "entropy", "--bits", "2", "--by", str(evidence)) < weights.stat().st_size / 12
    assert main([*command, str(refused), "--where", "conv*"]) == 2
    assert "leave out --where" in capsys.readouterr().err
    assert not refused.exists()


def shrunk(weights: Path, *options: str) -> int:
    target = weights.with_name("small.safetensors")
    assert main(["quantize", str(weights), str(target), "--force", *options]) == 0
    return target.stat().st_size


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq", "adaround", "hqq"])
def test_each_method_writes_a_smaller_file_that_loads(weights: Path, method: str, capsys) -> None:
    evidence = weights.with_name("e.safetensors")
    assert main(["score", "digits", str(weights), str(evidence), "--batches", "3"]) == 0
    by = [] if method == "hqq" else ["--by", str(evidence)]
    sizes = [shrunk(weights, "--method", method, "--bits", bits, *by) for bits in ("8", "4", "2")]
    assert weights.stat().st_size > 2 * sizes[0] > 2 * sizes[1] > 2 * sizes[2]
    assert shrunk(weights, "--method", method, "--bits", "4", "--codes", "entropy", *by) < sizes[1]
    assert main(["explain", "digits", str(weights.with_name("small.safetensors")), "--what", "signal"]) in (0, 1)


def test_entropy_takes_two_kinds_of_evidence_and_fractions_of_a_bit(weights: Path, capsys) -> None:
    hessian, fisher = weights.with_name("h.safetensors"), weights.with_name("f.safetensors")
    for kind, file in (("hessian", hessian), ("fisher", fisher)):
        assert main(["score", "digits", str(weights), str(file), "--kind", kind, "--batches", "3"]) == 0
    by = ["--method", "entropy", "--by", str(hessian), "--fisher", str(fisher)]
    sizes = [shrunk(weights, "--bits", bits, *by) for bits in ("3.5", "2.5")]
    assert weights.stat().st_size > 4 * sizes[0] > 4 * sizes[1] + 4 * 10_000
    target, norms = weights.with_name("no.safetensors"), weights.with_name("n.safetensors")
    assert main(["score", "digits", str(weights), str(norms), "--kind", "norms", "--batches", "1"]) == 0
    capsys.readouterr()
    wrong = {
        "expected evidence of the kind fisher": [*by[:4], "--fisher", str(hessian)],
        "fisher says what outputs matter beside evidence of the kind hessian": ["--method", "entropy", *by[4:]],
        "--fisher is for the method entropy, not gptq": ["--method", "gptq", "--fisher", str(fisher)],
        "expected evidence of the kind kronecker, hessian or fisher, got 'norms'": [*by[:3], str(norms)],
        "25 is not a number above 0 and at most 24": [*by, "--bits", "25"],
    }
    for says, options in wrong.items():
        assert main(["quantize", str(weights), str(target), *options]) == 2
        assert says in capsys.readouterr().err
        assert not target.exists()


def test_wrong_options_and_wrong_evidence_write_nothing(weights: Path, capsys) -> None:
    evidence, target = weights.with_name("e.safetensors"), weights.with_name("no.safetensors")
    other = weights.with_name("other.safetensors")
    assert main(["train", "digits", str(other), "--epochs", "1", "--seed", "7"]) == 0
    assert main(["score", "digits", str(other), str(evidence), "--batches", "3", "--seed", "7"]) == 0
    capsys.readouterr()
    wrong = {
        "--step is for the method gptq, not hqq": ["--method", "hqq", "--step", "1"],
        "--by is for the method nearest, gptq, awq, adaround or entropy, not hqq": [
            "--method",
            "hqq",
            "--by",
            str(evidence),
        ],
        "was measured on other weights": ["--method", "gptq", "--bits", "4", "--by", str(evidence)],
        "bits of symmetric levels are 2 to 8, not 1": ["--method", "gptq", "--bits", "1", "--by", str(evidence)],
        "--method gptq needs --by FILE": ["--method", "gptq", "--bits", "4"],
        "9 is not a whole number from 1 to 8": ["--bits", "9"],
        "there is no codec 'entropi'": ["--codes", "entropi"],
        "no such file": ["--by", str(weights.with_name("none.safetensors"))],
        "none of the": ["--where", "nothing*"],
    }
    for says, options in wrong.items():
        assert main(["quantize", str(weights), str(target), *options]) == 2
        line = capsys.readouterr().err
        assert says in line, line
        assert line.count("\n") == 1
        assert not target.exists()


def test_wanda_takes_norms_and_says_what_else_was_given(weights: Path, capsys) -> None:
    evidence, target = weights.with_name("e.safetensors"), weights.with_name("no.safetensors")
    words = ["prune", str(weights), str(target), "--fraction", "0.5", "--method", "wanda", "--by"]
    for kind, more in (("fisher", "; to rank by that: --method scores"), ("hessian", "")):
        assert main(["score", "digits", str(weights), str(evidence), "--kind", kind, "--batches", "1", "--force"]) == 0
        capsys.readouterr()
        assert main([*words, str(evidence)]) == 2
        assert f"(score --kind norms), got evidence of the kind '{kind}'{more}; see" in capsys.readouterr().err
    assert main([*words, str(weights)]) == 2
    assert "(score --kind norms), got scores of no kind; to rank by that" in capsys.readouterr().err
    assert not target.exists()
    assert main(["score", "digits", str(weights), str(evidence), "--kind", "norms", "--batches", "1", "--force"]) == 0
    assert main([*words, str(evidence)]) == 0


def test_shared_values_go_where_the_loss_is_sensitive(weights: Path, capsys) -> None:
    evidence = weights.with_name("f.safetensors")
    assert main(["score", "digits", str(weights), str(evidence), "--kind", "fisher", "--batches", "2"]) == 0
    found = []
    for name, by in (("plain", []), ("weighed", ["--by", str(evidence)])):
        small = weights.with_name(f"{name}.safetensors")
        assert main(["share", str(weights), str(small), "-k", "4", *by]) == 0
        found.append(formats.open(small))
    name = next(n for n, item in found[0].items() if len(item.spec.shape) == 2)
    assert not np.array_equal(found[0][name].array(), found[1][name].array())
    assert len(np.unique(found[1][name].array())) <= 5
