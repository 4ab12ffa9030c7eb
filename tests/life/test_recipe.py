"""The recipe of a run: complete, checked key by key, and honest about mistakes."""

from dataclasses import fields, is_dataclass

import pytest

from steelyard.errors import RecipeError
from steelyard.life.recipe import Recipe, dump, embedded, load, parse, split_name


def test_the_embedded_recipe_is_valid_and_says_everything_that_matters():
    recipe = load()
    assert recipe.task == "digits"
    assert recipe.move is not None
    assert recipe.shrink is not None
    for section in ("start", "train", "explain", "move", "shrink", "ship"):
        assert f"\n{section}:" in embedded()


def test_what_was_run_is_written_complete_and_reads_back_the_same():
    for recipe in (load(), parse("task: digits", "x")):
        text = dump(recipe)
        assert parse(text, "again") == recipe
        for part in fields(Recipe):
            value = getattr(recipe, part.name)
            assert part.name in text
            if is_dataclass(value):
                assert all(setting.name in text for setting in fields(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: digits\ntrian: {epochs: 3}", "my.yaml: $: there is no setting 'trian'; did you mean 'train'?"),
        ("task: digits\ntrain: {epoch: 3}", "$.train: there is no setting 'epoch'; did you mean 'epochs'?"),
        ("task: digits\ntrain: {epochs: many}", "$.train.epochs: expected int, got 'many'"),
        ("task: digits\ntrain: {epochs: 0}", "$.train.epochs: expected more than 0, got 0"),
        ("task: digits\ntrain: {schedule: onecycle}", "did you mean 'one-cycle'?"),
        ("task: digits\ntrain: {rate: .nan}", "$.train.rate: expected more than 0, got nan"),
        ("task: digits\ndeep_compression: {sparsity: 1}", "$.deep_compression: expected 0 <= sparsity < 1, got 1"),
        ("task: digits\nshrink: {confidence: 1}", "$.shrink: expected 0.5 <= confidence < 1, got 1"),
        ("task: digits\nshrink: {epochs: -1}", "$.shrink: expected epochs to be 0 or more, got -1"),
        ("task: digits\nshrink: {tolerance: 0}", "$.shrink: expected tolerance to be more than 0, got 0"),
        ("task: digits\nexplain: {strongest: -1}", "$.explain.strongest: expected more than 0, got -1"),
        ("task: digits\nthreads: 0", "$.threads: expected more than 0, got 0"),
        ("task: digits\nmove: {}", "$.move: the setting 'target' is missing"),
        ("task: {digits: {}, mnist: {}}", "$.task: expected one name with its options"),
        ("model: cnn", "the setting 'task' is missing"),
        ("- task", "expected keys such as task and model"),
        ("", "expected keys such as task and model"),
        ("task: [1", "is not YAML"),
        ("task: !!python/object/apply:os.system [id]", "is not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_remedy(text, said):
    with pytest.raises(RecipeError) as error:
        parse(text, "my.yaml")
    assert said in str(error.value)
    assert str(error.value).startswith("my.yaml")
    assert "\n" not in str(error.value)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert parse("task: digits\ntrain: {rate: 1e-3}", "x").train.rate == 1e-3


def test_a_section_that_is_null_is_left_out():
    recipe = parse("task: digits\nshrink: null\nexplain: null\nship: null", "x")
    assert (recipe.shrink, recipe.explain, recipe.ship, recipe.move) == (None, None, None, None)


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in (("none.yaml", "no such recipe"), ("", "found a directory"), ("binary.yaml", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            load(tmp_path / name)


def test_names_with_options():
    assert split_name("digits") == ("digits", {})
    assert split_name({"digits": {"shots": 5}}) == ("digits", {"shots": 5})
    assert split_name({"digits": None}) == ("digits", {})


def test_a_key_that_is_given_twice_is_refused():
    with pytest.raises(RecipeError, match="the key 'seed' is given twice"):
        parse("task: digits\nseed: 1\nseed: 2", "my.yaml")
