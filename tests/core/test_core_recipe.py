from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from steelyard.core.packed import Plan, nest, smallest
from steelyard.core.recipe import Reader, parse_call, to_data
from steelyard.core.transform import Step, Transform, chain, each, on
from steelyard.core.weights import Weights
from steelyard.core.where import Match, Where, where
from steelyard.errors import CodecError, RecipeError, UnknownNameError


@dataclass(frozen=True)
class Inner:
    a: int
    b: str = "x"


@dataclass(frozen=True)
class Everything(Step):
    """One field of each type that a recipe can say."""

    name: ClassVar[str] = "everything"
    rate: float
    count: int = 3
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    maybe: int | None = None
    either: int | str = 0
    extra: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner(1)
    plan: Plan = None
    only: Where = Match()  # noqa: RUF009
    then: Transform | None = None
    what: Any = None

    def __post_init__(self):
        if self.rate < 0:
            raise CodecError("the rate is negative")

    def __call__(self, weights):
        return weights


class Known(dict):
    def __missing__(self, name):
        raise UnknownNameError("step", name, self)


@pytest.fixture
def reader(codecs):
    return Reader(Known(codecs), Known(everything=Everything))


def there_and_back(reader, step):
    data = json.loads(json.dumps(to_data(step)))
    assert reader.step(data) == step
    return data


def test_defaults_are_left_out(reader):
    assert there_and_back(reader, Everything(0.5)) == {"everything": {"rate": 0.5, "extra": {}}}


def test_every_type_of_field_comes_back(reader, codecs):
    step = Everything(
        0.25, 4, True, "slow", (1, 2), (3, "b"), 7, "text", {"a": 1.5}, Inner(2, "y"),
        nest(codecs["split"](), left=None, right=smallest(None, codecs["scaled"](3))),
        (where("a*") & ~where("b", ndim=2, kind="float")) | where(min_size=3, dtype="float16"),
        on(where("x"), Everything(1.0)), [1, {"a": None}],
    )  # fmt: skip
    there_and_back(reader, step)


def test_chains_and_on(reader):
    step = chain(Everything(1.0), on(~where("a"), Everything(2.0), Everything(3.0)))
    data = there_and_back(reader, step)
    assert data[1]["on"]["where"] == {"not": "a"}
    assert reader.step([]) == chain()


def test_plans(reader, codecs):
    for plan in (None, codecs["scaled"](), codecs["scaled"](5), nest(codecs["split"](), left=codecs["scaled"]()),
                 smallest(codecs["scaled"](), None)):  # fmt: skip
        assert reader.plan(to_data(plan)) == plan
    assert to_data(codecs["scaled"]()) == "scaled"
    assert reader.plan("plain") is None


@pytest.mark.parametrize("step", [each(lambda item: item), np.zeros(3), {1, 2}, object()])
def test_what_cannot_be_written_down(step):
    with pytest.raises(RecipeError, match="cannot be written into a recipe"):
        to_data(step)


def test_weights_are_named_by_file_and_not_written_down():
    for weights in (Weights.of({"a": np.zeros(3)}), Weights([])):
        with pytest.raises(RecipeError, match="save it and name the file"):
            to_data(weights)


def test_yaml_writes_small_numbers_as_text(reader):
    assert reader.step({"everything": {"rate": "1e-3"}}).rate == 0.001
    assert reader.step({"everything": {"rate": 2}}).rate == 2.0
    assert reader.step({"everything": {"rate": 1, "sizes": 5}}).sizes == (5,)


@pytest.mark.parametrize(("settings", "message"), [
    ({}, r"\$\.everything: the setting 'rate' is missing"),
    ({"rate": 1, "cuont": 2}, r"\$\.everything: there is no setting 'cuont'; did you mean 'count'"),
    ({"rate": "fast"}, r"\$\.everything\.rate: expected a number, got 'fast'"),
    ({"rate": True}, r"\.rate: expected float, got True"),
    ({"rate": None}, r"\.rate: expected float, got None"),
    ({"rate": -1}, r"\$\.everything: the rate is negative"),
    ({"rate": 1, "count": 1.5}, r"\.count: expected int, got 1.5"),
    ({"rate": 1, "count": True}, r"\.count: expected int, got True"),
    ({"rate": 1, "flag": 1}, r"\.flag: expected bool, got 1"),
    ({"rate": 1, "mode": "fsat"}, r"\.mode: 'fsat' is not a choice; did you mean 'fast'"),
    ({"rate": 1, "sizes": [1, "a"]}, r"\.sizes\[1\]: expected int, got 'a'"),
    ({"rate": 1, "pair": [1]}, r"\.pair: expected 2 values, got 1"),
    ({"rate": 1, "maybe": "x"}, r"\.maybe: expected int, got 'x'"),
    ({"rate": 1, "either": [1]}, r"\.either: expected str"),
    ({"rate": 1, "extra": [1]}, r"\.extra: expected settings"),
    ({"rate": 1, "extra": {"a": "b"}}, r"\.extra\.a: expected a number"),
    ({"rate": 1, "inner": {"b": "y"}}, r"\.inner: the setting 'a' is missing"),
    ({"rate": 1, "plan": "scald"}, r"\.plan: there is no .*did you mean 'scaled'"),
    ({"rate": 1, "plan": {"split": {"left": {"scaled": {"factor": 0}}}}}, r"\.plan\.split\.left\.scaled: the factor"),
    ({"rate": 1, "plan": {"smallest": []}}, r"\.plan\.smallest: expected a list of at least one"),
    ({"rate": 1, "plan": {"smallest": ["scaled", 3]}}, r"\.smallest\[1\]: expected a name"),
    ({"rate": 1, "plan": {"a": 1, "b": 2}}, r"\.plan: expected a name, or a name with its settings"),
    ({"rate": 1, "only": 3}, r"\.only: expected settings"),
    ({"rate": 1, "only": {"patern": "a"}}, r"\.only: there is no setting 'patern'"),
    ({"rate": 1, "only": {"both": ["a"]}}, r"\.only\.both: expected a list of two"),
    ({"rate": 1, "only": {"either": ["a", {"not": 4}]}}, r"\.either\[1\]\.not: expected settings"),
    ({"rate": 1, "then": "evrything"}, "did you mean 'everything'"),
    (7, r"\$\.everything: expected settings"),
    ([1], r"\$\.everything: expected settings"),
])  # fmt: skip
def test_every_mistake_is_named_with_its_place(reader, settings, message):
    with pytest.raises(RecipeError, match=message):
        reader.step({"everything": settings})


@pytest.mark.parametrize("data", [None, 3, {}, {"a": {}, "b": {}}, {3: {}}, [3]])
def test_what_is_no_step_at_all(reader, data):
    with pytest.raises(RecipeError, match="expected a name"):
        reader.step(data)


def test_the_place_in_a_list_is_said_and_a_lone_wrong_name_needs_no_place(reader):
    with pytest.raises(RecipeError, match=r"^\$\[1\]: there is no step 'x'"):
        reader.step([{"everything": {"rate": 1}}, "x"])
    with pytest.raises(UnknownNameError, match=r"^there is no step 'x'"):
        reader.step("x")


def test_data_of_great_depth_is_an_error_of_ours(reader):
    plan, steps, condition = "scaled", [], "a"
    for _ in range(5000):
        plan, steps, condition = {"split": {"left": plan}}, [steps], {"not": condition}
    for read, data in ((reader.plan, plan), (reader.step, steps), (reader.where, condition)):
        with pytest.raises(RecipeError, match="nested more than 100 deep") as caught:
            read(data)
        assert len(str(caught.value)) < 200


def test_a_nesting_is_not_one_codec(reader):
    with pytest.raises(RecipeError, match="expected one codec"):
        reader.codec({"split": {"left": "scaled"}})
    with pytest.raises(RecipeError, match="expected one codec"):
        reader.codec("plain")


def test_a_null_means_defaults(reader, codecs):
    assert reader.plan({"scaled": None}) == codecs["scaled"]()


@pytest.mark.parametrize(("text", "data"), [
    ("entropy", "entropy"),
    ("entropy()", "entropy"),
    (" palette(k=16) ", {"palette": {"k": 16}}),
    ("a(b=c(d=-1.5, e='x', f=None, g=True, h=[1, 2], i=(1,)))",
     {"a": {"b": {"c": {"d": -1.5, "e": "x", "f": None, "g": True, "h": [1, 2], "i": (1,)}}}}),
    ("smallest(a, b(c=1), plain)", {"smallest": ["a", {"b": {"c": 1}}, "plain"]}),
])  # fmt: skip
def test_calls(text, data):
    assert parse_call(text) == data


@pytest.mark.parametrize(
    "text", ["", "a b", "a(1)", "a(**b)", "a.b(c=1)", "__import__('os')", "a(b=c+1)", "a(b=lambda: 1)", "a(b=[c()])",
             "(" * 500, "-" * 100_000 + "1", "a(" * 5000, "a\x00", "a(b={1: 2})", "smallest(x=1)(y=2)", "f'{a}'"]
)  # fmt: skip
def test_a_call_that_is_anything_else(text):
    with pytest.raises(RecipeError, match="cannot read"):
        parse_call(text)


def test_types_of_settings_are_worked_out_once_for_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Reader({}, {}).build(Everything, {"rate": 1})
    monkeypatch.setattr("typing.get_type_hints", lambda _: pytest.fail("worked out again"))
    assert Reader({}, {}).build(Everything, {"rate": 1}) == first
