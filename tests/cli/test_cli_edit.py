"""The verbs that write a file: what they say is measured, and wrong use writes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import steelyard as sy
from steelyard.errors import WeightsError
from steelyard.explain.account import account

EDITS = {
    "convert": ["--dtype", "bf16"],
    "prune": ["--fraction", "0.75"],
    "quantize": ["--bits", "4", "--axis", "0"],
    "share": ["-k", "8"],
}


@pytest.mark.parametrize("verb", EDITS)
def test_what_is_said_is_what_was_written(steelyard, model, verb):
    target = model.with_name("out.safetensors")
    result = steelyard(verb, model, target, *EDITS[verb], "--json")
    assert result.status == 0
    tied = "1 tie is kept as metadata; other readers see one name: --untie writes each\n"
    assert result.err == (tied if verb == "convert" else "")
    tensors, total = (json.loads(line) for line in result.out.splitlines())
    before, after = sy.open(model), sy.open(target)
    assert list(after) == list(before)
    assert dict(after.ties) == dict(before.ties)
    a, b = before.arrays(), after.arrays()
    distance = norm = zeros = 0.0
    for row in tensors["rows"]:
        x, y = a[row["name"]].astype(np.float64), b[row["name"]].astype(np.float64)
        assert row["error"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)
        assert row["after"] == after[row["name"]].stored
        assert row["before"] == before[row["name"]].stored
        assert row["zeros"] == (y == 0).mean()
        distance, norm, zeros = distance + ((y - x) ** 2).sum(), norm + (x**2).sum(), zeros + (y == 0).sum()
    (whole,) = total["rows"]
    assert whole["error"] == pytest.approx((distance / norm) ** 0.5, rel=1e-9)
    assert whole["zeros"] == zeros / before.size
    assert (whole["file before"], whole["file after"]) == (model.stat().st_size, target.stat().st_size)
    assert whole["ratio"] == model.stat().st_size / target.stat().st_size


def test_each_verb_does_what_it_is_called(steelyard, model):
    found = {}
    for verb, options in EDITS.items():
        target = model.with_name(f"{verb}.safetensors")
        assert steelyard(verb, model, target, *options).status == 0
        found[verb] = sy.open(target)
    assert found["convert"]["model.layer.weight"].spec.dtype.name == "bfloat16"
    assert found["convert"]["model.steps"].array() == 7
    matrices = ("model.embed.weight", "model.layer.weight")
    zeros = sum(np.count_nonzero(found["prune"][name].array() == 0) for name in matrices)
    assert zeros == round(0.75 * (40 * 16 + 16 * 32))
    assert found["quantize"]["model.layer.weight"].scheme.codec.bits == 4
    assert all(np.unique(found["share"][name].array()).size <= 8 for name in matrices)
    bias = sy.open(model)["model.layer.bias"].array()
    for verb in ("prune", "quantize", "share"):
        assert np.array_equal(found[verb]["model.layer.bias"].array(), bias)
        assert found[verb]["model.layer.weight"].stored < sy.open(model)["model.layer.weight"].stored


def test_where_leaves_the_others_alone(steelyard, model):
    target = model.with_name("out.safetensors")
    steelyard("prune", model, target, "--fraction", "1", "--where", "*.weight", "--where", "!*embed*")
    before, after = sy.open(model).arrays(), sy.open(target).arrays()
    assert not after["model.layer.weight"].any()
    assert np.array_equal(after["model.embed.weight"], before["model.embed.weight"])


def test_codec_and_rename(steelyard, model):
    target = model.with_name("out.safetensors")
    result = steelyard(
        "convert", model, target, "--rename", "model.*=*", "--where", "*layer*", "--codec", "palette(k=65536)"
    )
    assert result.status == 0
    after = sy.open(target)
    assert list(after) == ["model.embed.weight", "layer.weight", "layer.bias", "model.steps"]
    assert after["layer.weight"].scheme.codec.k == 65536
    assert np.array_equal(after["layer.weight"].array(), sy.open(model)["model.layer.weight"].array())
    plain = model.with_name("plain.safetensors")
    steelyard("convert", target, plain, "--codec", "plain")
    assert sy.open(plain)["layer.weight"].scheme is None


@pytest.mark.parametrize("options", [(), ("--shard-size", "2kB")])
def test_untied_every_name_is_there_for_other_readers(steelyard, model, options):
    from safetensors import safe_open

    target = model.with_name("out.safetensors.index.json" if options else "out.safetensors")
    result = steelyard("convert", model, target, "--untie", "--verify", "--rename", "head.*=lm_head.*", *options)
    assert (result.status, result.err) == (0, "")
    found = {}
    for path in model.parent.glob("out*.safetensors"):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert sorted(found) == sorted(["lm_head.weight", *sy.open(model)])
    assert np.array_equal(found["lm_head.weight"], found["model.embed.weight"])


@pytest.mark.parametrize("options", [("--verify",), ("--codec", "plain"), ("--verify", "--shard-size", "1MB")])
def test_a_damaged_source_is_blamed_and_nothing_stays(steelyard, tmp_path, options):
    whole = sy.pack(np.zeros(4096, np.uint8), sy.Entropy())
    stream = np.full_like(whole.parts["stream"], 255)
    damaged = sy.Packed(whole.spec, whole.codec, {**whole.parts, "stream": stream})
    source = tmp_path / "source.safetensors"
    sy.write(sy.Weights.of({"a": np.zeros(50_000, np.float32), "b": damaged}), source)
    target = tmp_path / f"out.safetensors{'.index.json' if '--shard-size' in options else ''}"
    result = steelyard("convert", source, target, *options)
    assert result.status == 2
    assert result.err.startswith(f"steelyard: {source} @")
    assert "'b': entropy" in result.err
    assert "fetch a whole copy" in result.err
    assert "run the same command again" not in result.err
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_tensors_of_a_checkpoint_that_are_left_out_are_told(steelyard, tmp_path):
    torch = pytest.importorskip("torch")
    state = {"w": torch.ones(3), "nowhere": torch.empty(3, device="meta")}
    torch.save(state, tmp_path / "a.pt")
    result = steelyard("convert", tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert result.status == 0
    assert result.err.startswith(
        "1 tensor of the checkpoint was left out ('nowhere: on the meta device, without values'); "
    )
    assert list(sy.open(tmp_path / "b.safetensors")) == ["w"]


def test_shards_in_a_folder_that_is_missing(steelyard, model, tmp_path):
    result = steelyard("convert", model, tmp_path / "c" / "shd", "--shard-size", "1MB")
    assert result.status == 2
    assert f"the folder '{tmp_path / 'c' / 'shd'}' is not there; create it first" in result.err


def test_text_of_quantize(steelyard, model, golden):
    golden(steelyard("quantize", model, model.with_name("out.safetensors"), "--bits", "4").out)


def test_quantize_by_entropy_takes_the_bits_that_it_is_given(steelyard, tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    sy.write(sy.Weights.of({"w": x, "b": x[0]}), tmp_path / "m.safetensors")
    words = ["quantize", tmp_path / "m.safetensors", tmp_path / "o.safetensors", "--method", "entropy"]
    assert steelyard(*words, "--bits", "2.5", "--states", "32", "--importance", "b=2").status == 0
    assert sum(item.stored for item in sy.open(tmp_path / "o.safetensors").values()) * 8 / x.size == pytest.approx(
        2.5, rel=0.05
    )


def wrong(folder, model):
    """Arguments that cannot work, and a word that the line must say."""
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes(model.read_bytes()[:-5])
    (folder / "head.safetensors").write_bytes(model.read_bytes()[:20])
    (folder / "there.safetensors").write_bytes(b"precious")
    out = folder / "out.safetensors"
    yield [folder / "missing.safetensors", out], "missing.safetensors"
    yield [Path(__file__).parent, out], "no file of weights"
    yield [folder / "empty.safetensors", out], "empty"
    yield [folder / "cut.safetensors", out], "cut.safetensors"
    yield [folder / "head.safetensors", out], "head.safetensors"
    yield [model, model], "the source itself"
    yield [model, model, "--force"], "the source itself"
    yield [model, folder / "there.safetensors"], "--force"
    yield [model, folder / "nowhere" / "x.safetensors"], "nowhere"
    yield [model, folder / "x.unknown"], "'.unknown'; write it under a name ending in .safetensors"
    yield [model, folder], "director"
    yield [model, out, "--where", "nothing*"], "none of the 4 tensors"
    yield [model, out, "--html", folder / "nowhere" / "x.html"], "make it first"
    yield [model], "TARGET"


@pytest.mark.parametrize("verb", EDITS)
def test_wrong_use_writes_nothing(steelyard, model, tmp_path, verb):
    cases = list(wrong(tmp_path, model))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words, said in cases:
        result = steelyard(verb, *words, *EDITS[verb])
        assert (result.status, result.out) == (2, ""), words
        assert result.err.count("\n") == 1
        assert said in result.err, result.err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, words


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("prune", ["--fraction", "2"], "between 0 and 1"),
        ("prune", [], "--fraction"),
        ("prune", ["--fraction", "0.5", "--pattern", "2:4"], "one of them"),
        (
            "prune",
            ["--pattern", "3:5"],
            "[40, 16] and of 1 more; leave out what it does not fit: --where '!model.embed.weight,!model.layer.weight'",
        ),
        ("prune", ["--pattern", "5:2"], "a pattern is N:M"),
        ("prune", ["--fraction", "0.5", "--method", "wanda"], "--method wanda needs --by FILE"),
        ("prune", ["--fraction", "0.5", "--bits", "4"], "--bits is for sparsegpt"),
        ("prune", ["--fraction", "0.5", "--budget", "parameters"], "--budget is for structured"),
        ("prune", ["--fraction", "1.5", "--structured", "digits"], "above 0 and below 1"),
        ("prune", ["--fraction", "0.5", "--structured", "digits"], "do not match"),
        ("prune", ["--fraction", "0.5", "--structured", "digits", "--method", "wanda"], "not by wanda"),
        ("prune", ["--fraction", "0.5", "--codec", "bitmsk"], "did you mean 'bitmask'?"),
        ("prune", ["--fraction", "0.5", "--codec", "bitmask(msk=plain)"], "there is no setting 'msk'"),
        ("prune", ["--fraction", "0.5", "--codec", "bitmask("], "was never closed\n"),
        ("convert", ["--dtype", "bf61"], "there is no dtype"),
        ("convert", ["--rename", "model"], "PATTERN=NEW"),
        ("convert", ["--rename", "model.*=x"], "the same name"),
        ("convert", ["--shard-size", "5QB"], "expected a size such as 5GB"),
        ("convert", ["--shard-size", "-1"], "expected a size such as 5GB"),
        ("convert", ["--shard-size", "0.1B"], "expected a size such as 5GB"),
        ("convert", ["--shard-size", "nanGB"], "expected a size such as 5GB"),
        ("convert", ["--shard-size", "1GB"], "expected a folder or a name ending in .safetensors.index.json"),
        ("convert", ["--split", "*.weight"], "PATTERN=NEW"),
        ("convert", ["--split", "*.bias=*.a:1,*.b"], "a share for each of the 2 parts"),
        ("convert", ["--split", "*.bias=*.a:5,*.b:2"], "cannot be split 5:2"),
        ("convert", ["--split", "*.embed.*=a,b"], "also called 'head.weight'"),
        ("convert", ["--stack", "*.bias=b"], "one '#'"),
        ("convert", ["--join", "*.bias=b"], "two or more globs"),
        ("convert", ["--rename", "zz*=y*"], "no name matches"),
        ("convert", ["--dtype", "int8"], "round fractions with quantize"),
        ("convert", ["--dtype", "bf16", "--where", "*.steps"], "there are none"),
        *(
            ("quantize", ["--bits", bits], f"{bits} is not a whole number from 1 to 8, which the method nearest needs")
            for bits in ("0", "9", "3.5", "-1")
        ),
        *(
            (
                "quantize",
                ["--bits", bits, "--method", "entropy"],
                f"{bits} is not a number above 0 and at most 24, which",
            )
            for bits in ("0", "25")
        ),
        ("lowrank", [], "give one of --rank, --keep and --error, how much of each matrix stays: got none of them"),
        (
            "lowrank",
            ["--rank", "2", "--keep", "0.5"],
            "one of --rank, --keep and --error, how much of each matrix stays: got --rank and --keep",
        ),
        ("quantize", ["--method", "entropy", "--axis", "0"], "--axis is for the method nearest"),
        ("quantize", ["--method", "entropy", "--importance", "x"], "GLOB=NUMBER"),
        ("quantize", ["--method", "entropy", "--importance", "nothing*=2"], "no weight in scope matches 'nothing*'"),
        ("quantize", ["--states", "8"], "--states is for the method entropy"),
        ("quantize", ["--grid", "nf4", "--bits", "4"], "--bits is for uniform levels, not for --grid nf4"),
        ("quantize", ["--grid", "nf4", "--axis", "0"], "--axis is for uniform levels, not for --grid nf4"),
        ("quantize", ["--grid", "mxfp4", "--group", "8"], "mxfp4 has groups of 32: --group is for nf4 and fp8"),
        ("quantize", ["--grid", "nf4", "--method", "hqq"], "--grid is for the method nearest, not hqq"),
        ("quantize", ["--grid", "nf4", "--where", "*.bias"], "none of the 1 tensors can be encoded: expected floating"),
        ("share", ["--width", "4", "--scope", "global"], "--scope is for single values, not for the runs of --width"),
        ("share", ["--width", "4", "--codec", "plain"], "--codec is for single values, not for the runs of --width"),
        ("share", ["--product"], "--product is for runs: give --width as well"),
        ("share", ["--width", "1"], "--width"),
        ("share", ["--width", "4", "--where", "*.bias"], "none of the 1 tensors can be encoded"),
        ("quantize", ["--method", "entropy", "--bits", "0.001"], "0.001 bits for each weight are too few: with every"),
        ("quantize", ["--axis", "7"], "axis 7 of a tensor with 2 axes; give one from -2 to 1, or choose others"),
        ("quantize", ["--axis", "-3", "--error", "2"], "axis -3 of a tensor with 2 axes; give one from -2 to 1, or"),
        ("convert", ["--codec", "scaled(axis=2)", "--where", "*.weight"], "with 2 axes; give one from -2 to 1, or"),
        *(
            (
                "convert",
                ["--codec", codec],
                "mxfp4: blocks of GGML that are read here and not written; encode as floatgrid(",
            )
            for codec in ("mxfp4", "mxfp4(block=8)", "floatgrid(grid='mxfp4')", "smallest(plain, scaled(values=mxfp4))")
        ),
        ("convert", ["--codec", "q2_k"], "q2_k: blocks of GGML that are read here and not written; encode as q8_0"),
        ("quantize", ["--group", "4", "--axis", "0"], "group"),
        ("share", ["-k", "0"], "-k"),
        *(
            (verb, [*options, "--where", "*.bias,*.steps"], f"none of the 2 tensors can be {done}: expected")
            for verb, options, done in (
                ("prune", ["--fraction", "0.5"], "pruned"),
                ("prune", ["--pattern", "2:4"], "pruned"),
                ("quantize", ["--bits", "4"], "rounded"),
                ("quantize", ["--method", "hqq", "--bits", "4"], "rounded"),
                ("share", [], "shared"),
                ("lowrank", ["--keep", "0.5"], "factored"),
            )
        ),
        ("quantize", ["--method", "entropy", "--where", "*.steps"], "and an axis or more, found 'model.steps' int64[]"),
    ],
)
def test_wrong_options_write_nothing(steelyard, model, verb, options, said):
    result = steelyard(verb, model, model.with_name("out.safetensors"), *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert said in result.err
    assert os.listdir(model.parent) == [model.name]


def test_what_is_advised_for_mxfp4_works(steelyard, model):
    said = steelyard("convert", model, model.with_name("no.safetensors"), "--codec", "mxfp4").err
    codec = said.rpartition("encode as ")[2].strip()
    assert steelyard("convert", model, model.with_name("o.npz"), "--codec", codec, "--where", "*.weight").status == 0


def test_only_where_a_source_is_damaged_another_copy_is_advised(steelyard, model):
    result = steelyard("convert", model, model.with_name("o.safetensors"), "--codec", "affine", "--where", "*.steps")
    assert "cannot hold int64" in result.err
    assert "damaged" not in result.err


def test_a_group_that_is_longer_than_any_row(steelyard, model):
    say = "--group 33 is longer than any row (32 at most): each row has one scale\n"
    for group, said in (("33", say), ("32", "")):
        result = steelyard("quantize", model, model.with_name(f"{group}.safetensors"), "--group", group)
        assert (result.status, result.err) == (0, said)
    wide, long = (sy.open(model.with_name(f"{g}.safetensors"))["model.layer.weight"].array() for g in (33, 32))
    assert np.array_equal(wide, long)


@pytest.mark.parametrize("verb", [verb for verb in EDITS if verb != "convert"])
def test_values_that_are_no_numbers_are_told_where_they_are_copied_and_refused_where_they_are_changed(
    steelyard, model, verb
):
    arrays = sy.open(model).arrays()
    out, odd = model.with_name("out.safetensors"), model.with_name("odd.safetensors")
    for value, said in ((np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf")):
        sy.write(sy.Weights.of({**arrays, "bias": np.float32([[0, 1, value]])[0]}), odd)
        result = steelyard(verb, odd, out, *EDITS[verb], "--force", "--json")
        assert result.status == 0
        assert result.err == (
            "1 tensor that was copied has NaN or infinite values, the first in 'bias' "
            f"({said} at [2]); steelyard inspect --health says more\n"
        )
        tensors, total = (json.loads(line)["rows"] for line in result.out.splitlines())
        assert [row["not finite"] for row in tensors] == [None] * 4 + [f"{said} at [2]"]
        assert total[0]["not finite"] == 1
        embed = arrays["model.embed.weight"].copy()
        embed[3, 1] = embed[7, 0] = value
        sy.write(sy.Weights.of({**arrays, "model.embed.weight": embed}), odd)
        before = out.read_bytes()
        result = steelyard(verb, odd, out, *EDITS[verb], "--force")
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert "'model.embed.weight'" in result.err
        assert verb == "quantize" or f"the first at [3, 1] ({said.lower()})" in result.err
        assert out.read_bytes() == before


def test_which_codecs_were_lossy(steelyard, model):
    def total(*words):
        return json.loads(steelyard(*words, "--force", "--json").out.splitlines()[1])["rows"][0]

    small, out = model.with_name("small.safetensors"), model.with_name("out.safetensors")
    found = total("quantize", model, small, "--bits", "4")
    assert (found["lossy"], found.get("lossy before")) == ("affine in 2 tensors", None)
    found = total("prune", small, out, "--fraction", "0.5")
    assert (found.get("lossy"), found["lossy before"]) == (None, "affine in 2 tensors")
    found = total("prune", model, out, "--fraction", "0.5")
    assert (found.get("lossy"), found.get("lossy before")) == (None, None)
    found = total("prune", model, out, "--fraction", "0.5", "--codec", "bitmask(values=palette(k=4))")
    assert found["lossy"] == "palette in 2 tensors"
    found = total("convert", model, out, "--codec", "affine(bits=4)", "--where", "*layer.weight")
    assert found["lossy"] == "affine in 1 tensor"
    found = total("convert", small, out, "--codec", "plain")
    assert (found.get("lossy"), found["lossy before"]) == (None, "affine in 2 tensors")
    text = steelyard("lowrank", model, out, "--force", "--keep", "0.5", "--factors", "affine(bits=8)").out
    assert "lossy        lowrank in 2 tensors, affine in 2 tensors" in text


@pytest.fixture
def larger(tmp_path):
    """A file with a matrix that is worth rounding, one that is not, and a bias."""
    rng = np.random.default_rng(1)
    shapes = {"large.weight": (96, 128), "tiny.weight": (2, 2), "bias": (96,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    sy.write(sy.Weights.of(arrays), tmp_path / "larger.safetensors")
    return tmp_path / "larger.safetensors"


@pytest.mark.parametrize(
    ("grid", "options", "held", "bits"),
    [
        ("nf4", [], "floatgrid(codes=bits)", 4.5),
        ("nf4", ["--group", "32", "--codes", "entropy"], "floatgrid(block=32, codes=entropy)", 5),
        ("fp8", [], "floatgrid(grid=e4m3, block=None, codes=bits)", 8),
        ("mxfp4", [], "floatgrid(grid=e2m1, block=32, scales=e8m0, codes=bits)", 4.25),
        ("mxfp6", [], "floatgrid(grid=e2m3, block=32, scales=e8m0, codes=bits)", 6.25),
        ("mxfp8", [], "floatgrid(grid=e4m3, block=32, scales=e8m0, codes=bits)", 8.25),
        ("nvfp4", [], "floatgrid(grid=e2m1, block=16, scales=e4m3, codes=bits)", 4.5),
    ],
)
def test_grids_of_small_floats(steelyard, larger, grid, options, held, bits):
    result = steelyard("quantize", larger, larger.with_name("o.safetensors"), "--grid", grid, *options, "--json")
    rows = json.loads(result.out.splitlines()[0])["rows"]
    assert [row["held"] for row in rows] == [held, "plain", "plain"]
    assert rows[0]["after"] * 8 / (96 * 128) == pytest.approx(bits, rel=0.05)
    assert 0 < rows[0]["error"] < 0.12
    assert [row["error"] for row in rows[1:]] == [0, 0]


def test_runs_of_weights_are_shared(steelyard, larger):
    def errors(*words):
        result = steelyard("share", larger, larger.with_name("o.safetensors"), "--force", "--json", *words)
        rows = json.loads(result.out.splitlines()[0])["rows"]
        assert [row["held"] for row in rows[1:]] == ["plain", "plain"]
        return rows[0]["error"], rows[0]["after"], rows[0]["held"]

    few, many = errors("--width", "2", "-k", "16"), errors("--width", "2")
    assert few[2].startswith("vectors(k=16, width=2, codes=")
    assert many[2].startswith("vectors(width=2, codes=")
    assert few[0] > 2 * many[0]
    assert few[1] < many[1]
    product = errors("--width", "2", "-k", "16", "--product")
    assert "product=True" in product[2]
    assert product[0] < few[0]


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--bits", "4"],
        ["quantize", "--method", "hqq", "--bits", "4"],
        ["share", "-k", "2"],
        ["lowrank", "--keep", "1"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_what_would_not_become_smaller_is_copied(steelyard, larger, words):
    target = larger.with_name("o.safetensors")
    assert steelyard(words[0], larger, target, *words[1:]).status == 0
    before, after = sy.open(larger), sy.open(target)
    assert after["tiny.weight"].array().tobytes() == before["tiny.weight"].array().tobytes()
    assert after["large.weight"].array().tobytes() != before["large.weight"].array().tobytes()
    assert after["tiny.weight"].scheme is None


@pytest.mark.parametrize("words", [["quantize", "--bits", "8"], ["lowrank", "--rank", "2"], ["share"]])
def test_where_nothing_becomes_smaller_it_is_told(steelyard, larger, words):
    target = larger.with_name("o.safetensors")
    result = steelyard(words[0], larger, target, *words[1:], "--where", "tiny*")
    assert (result.status, result.err) == (
        0, "nothing changed: what was chosen would not become smaller, and all was copied\n"
    )  # fmt: skip
    assert target.read_bytes() == larger.read_bytes()


def test_what_leaves_nothing_is_told(steelyard, model):
    result = steelyard("prune", model, model.with_name("out.safetensors"), "--fraction", "1")
    assert (result.status, result.err) == (0, "nothing is left of what was chosen: every weight became 0\n")


def test_force_replaces_another_file(steelyard, model):
    target = model.with_name("out.safetensors")
    target.write_bytes(b"old")
    assert steelyard("convert", model, target, "--force").status == 0
    assert list(sy.open(target)) == list(sy.open(model))


def test_the_account_of_awkward_numbers():
    a = sy.Weights.of({"x": np.array([np.nan, np.inf, 2.0]), "z": np.zeros(2), "e": np.zeros((0, 3))})
    b = sy.Weights.of({"x": np.array([np.nan, np.inf, 0.0]), "z": np.ones(2), "e": np.zeros((0, 3))})
    tensors, total = account(a, b)
    assert tensors.column("error") == [1.0, float("inf"), 0.0]
    assert tensors.column("zeros") == [1 / 3, 0, 0]
    assert total.rows[0]["changed"] == 2
    with pytest.raises(WeightsError, match="cannot be compared"):
        account(a, b.select(sy.where("x")))
    with pytest.raises(WeightsError, match="cannot be compared"):
        account(b, sy.Weights([b["x"], b["e"], b["z"]]))


def test_what_cannot_change_a_value_is_not_read_again(steelyard, model):
    target = model.with_name("out.npz")
    result = steelyard("convert", model, target, "--json")
    tensors, total = (json.loads(line) for line in result.out.splitlines())
    assert [row["error"] for row in tensors["rows"]] == [None] * 4
    assert [row["after"] for row in tensors["rows"]] == [item.stored for item in sy.open(target).values()]
    assert (total["rows"][0]["tensors"], total["rows"][0]["changed"]) == (4, None)
    result = steelyard("convert", model, target, "--force", "--dtype", "f64", "--verify", "--json")
    assert json.loads(result.out.splitlines()[1])["rows"][0]["verified"] == 4
    result = steelyard(
        "convert", model, target, "--force", "--codec", "affine(bits=4)", "--where", "*layer.weight", "--json"
    )
    assert json.loads(result.out.splitlines()[1])["rows"][0]["changed"] == 1


@pytest.mark.parametrize(("size", "files"), [("1 kB", 3), ("2600B", 2), ("2.6KB", 2), ("4MiB", 1), ("5000", 1)])
def test_shards(steelyard, model, tmp_path, size, files):
    folder = tmp_path / "out"
    folder.mkdir()
    assert steelyard("convert", model, folder, "--shard-size", size, "--verify").status == 0
    names = sorted(os.listdir(folder))
    assert len(names) == files + 1
    assert names[-1] == "model.safetensors.index.json"
    found, expected = sy.open(folder), sy.open(model)
    assert {n: x.tobytes() for n, x in found.arrays().items()} == {n: x.tobytes() for n, x in expected.arrays().items()}
    back = tmp_path / "back.safetensors"
    result = steelyard("convert", folder, back, "--json")
    assert back.read_bytes() == model.read_bytes()
    total = json.loads(result.out.splitlines()[1])["rows"][0]
    assert total["file before"] == sum(path.stat().st_size for path in folder.iterdir())
    assert total["file after"] == back.stat().st_size


def test_no_file_of_the_source_is_ever_replaced(steelyard, model, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    steelyard("convert", model, folder, "--shard-size", "1kB")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in before:
        result = steelyard("convert", folder, path, "--force")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "is the source itself" in result.err
    assert steelyard("convert", folder, folder, "--force", "--shard-size", "2kB").status == 2
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_pieces_in_order(steelyard, tmp_path):
    source, target, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    sy.write(sy.Weights.of({"l.c@t.w": x, "l.e.0.w": x, "l.e.1.w": x + 1, "l.s": x[:2]}), source)
    options = ["--split", "*.c@t.w@1=*.q:4,*.k:1,*.v:1", "--stack", "*.e.#.*=*.e.*", "--rename", "l.*=*"]
    assert steelyard("convert", source, target, *options, "--unstack", "*.s=*.s.#", "--verify").status == 0
    found = {name: item.array().tolist() for name, item in sy.open(target).items()}
    expected = {"q": x[:, :4], "k": x[:, 4:5], "v": x[:, 5:], "e.w": np.stack([x, x + 1]), "s.0": x[0], "s.1": x[1]}
    assert found == {name: value.tolist() for name, value in expected.items()}
    options = ["--join", "q,k,v=c@t.w@1", "--unstack", "*.w=*.#.w", "--stack", "s.#=s", "--rename", "*=l.*"]
    assert steelyard("convert", target, back, *options, "--where", "!c@t").status == 0
    assert back.read_bytes() == source.read_bytes()


def test_pruning_by_evidence_does_what_the_steps_do(steelyard, model, tmp_path):
    rng = np.random.default_rng(1)
    inputs = {"model.embed.weight": 16, "model.layer.weight": 32}
    hessian, norms = tmp_path / "hessian.safetensors", tmp_path / "norms.safetensors"
    found = {name: rng.normal(size=(99, n)).astype(np.float32) for name, n in inputs.items()}
    for path, kind, values in (
        (hessian, "hessian", {name: (x.T @ x / 99)[None] for name, x in found.items()}),
        (norms, "norms", {name: np.sqrt((x**2).mean(0, keepdims=True)) for name, x in found.items()}),
    ):
        about = {"kind": kind, "samples": {}, "inputs first": []}
        sy.write(sy.Weights.of(values, meta={"evidence": json.dumps(about)}), path)
    out, before = tmp_path / "out.safetensors", sy.open(model)
    for options, step in (
        (["--fraction", "0.5", "--method", "wanda", "--by", norms], sy.Prune(0.5, "row", sy.open(norms))),
        (["--pattern", "2:4", "--method", "sparsegpt", "--by", hessian], sy.SparseGPT(0.5, sy.open(hessian), "2:4")),
        (["--pattern", "2:4"], sy.PruneNM("2:4")),
        (["--fraction", "0.5", "--scope", "erk"], sy.Prune(0.5, "erk")),
    ):
        assert steelyard("prune", model, out, *options, "--force").status == 0
        expected = sy.on(sy.where(min_ndim=2, kind="float"), step)(before).arrays()
        assert all(np.array_equal(x, expected[name]) for name, x in sy.open(out).arrays().items())
        assert out.stat().st_size < 0.75 * model.stat().st_size


def test_units_of_a_model_go_and_its_verbs_take_the_narrow_file(steelyard, tmp_path):
    whole, narrow = tmp_path / "whole.safetensors", tmp_path / "narrow.safetensors"
    assert steelyard("init", "digits", whole, "--model", "cnn", "--scheme", "he").status == 0
    assert steelyard("signal", "digits", narrow, "--model", "cnn").status == 2
    words = ("prune", whole, narrow, "--fraction", "0.6", "--structured", "digits", "--model", "cnn")
    result = steelyard(*words, "--budget", "multiplications", "--json")
    (table,) = map(json.loads, result.out.splitlines())
    meta = table["meta"]
    assert meta["multiplications"] <= 0.4 * meta["multiplications before"]
    assert (meta["file before"], meta["file"]) == (whole.stat().st_size, narrow.stat().st_size)
    assert [row["after"] for row in table["rows"]] == [
        len(sy.open(narrow)[f"{layer}.weight"].array()) for layer in ("conv1", "conv2", "fc1")
    ]
    assert steelyard("signal", "digits", narrow, "--model", "cnn", "--json").status in (0, 1)
    assert "exists already" in steelyard(*words).err


def test_blocks_of_a_model_go_and_its_verbs_take_the_shallow_file(steelyard, tmp_path):
    whole, shallow = tmp_path / "whole.safetensors", tmp_path / "shallow.safetensors"
    assert steelyard("init", "digits", whole, "--model", "transformer(layers=3)", "--scheme", "xavier").status == 0
    words = ("prune", whole, shallow, "--structured", "digits", "--model", "transformer(layers=3)", "--blocks", "2")
    result = steelyard(*words, "--json")
    (table,) = map(json.loads, result.out.splitlines())
    gone = {row["block"] for row in table["rows"]}
    assert len(gone) == 2
    assert not any(name.startswith(tuple(f"{block}." for block in gone)) for name in sy.open(shallow))
    assert steelyard("signal", "digits", shallow, "--model", "transformer(layers=3)", "--json").status in (0, 1)
    assert "one of them" in steelyard(*words, "--fraction", "0.5", "--force").err
