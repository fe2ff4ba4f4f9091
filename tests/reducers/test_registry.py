"""Reducers by name."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_compile.reducers import (
    ENTRY_POINT_GROUP,
    OPTIONAL_FIELDS,
    CDPrunerReducer,
    DivPruneReducer,
    GivenReducer,
    PruMergePlusReducer,
    PruMergeReducer,
    RandomReducer,
    Selection,
    TrimReducer,
    UniformReducer,
    VisionZipReducer,
    VisPrunerReducer,
    create,
    fitting,
    known,
    register,
    registry,
)

BUILT_IN = (
    *("cdpruner", "divprune", "given", "prumerge", "prumerge_plus"),
    *("random", "resize", "trim", "uniform", "vispruner", "visionzip"),
)
LISTED = ", ".join(sorted(BUILT_IN))


class Mine:
    """A third-party reducer with a required and an optional option."""

    name = "mine"
    requires = frozenset()

    def __init__(self, scale, *, ratio=0.5):
        self.options = (scale, ratio)

    def __call__(self, context, count):
        return Selection(torch.arange(count))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages with these entry points are installed: {name: "module:attribute"}."""

    def install(**values):
        points = EntryPoints(EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in values.items())
        monkeypatch.setattr(registry, "entry_points", lambda **params: points.select(**params))

    return install


@pytest.mark.parametrize(
    ("name", "options", "reducer"),
    [
        ("uniform", None, UniformReducer()),
        ("uniform", {}, UniformReducer()),
        ("random", {}, RandomReducer(seed=0)),
        ("random", {"seed": 7}, RandomReducer(seed=7)),
        ("given", {"indices": [[2, 0]]}, GivenReducer([[2, 0]])),
        ("vispruner", {"ratio": 0.25}, VisPrunerReducer(ratio=0.25)),
        ("cdpruner", {}, CDPrunerReducer()),
        ("divprune", {}, DivPruneReducer()),
        ("visionzip", {"contextual": 0.5}, VisionZipReducer(contextual=0.5)),
        ("prumerge", {"adaptive": True}, PruMergeReducer(adaptive=True)),
        ("prumerge_plus", {"neighbours": 8}, PruMergePlusReducer(neighbours=8)),
        ("trim", {}, TrimReducer()),
    ],
)
def test_built_in_reducers(name, options, reducer):
    assert create(name, options) == reducer
    assert reducer.name == name
    assert name in known()


def test_a_registered_factory_gets_the_options():
    register("mine", Mine)
    assert create("mine", {"scale": 2, "ratio": 0.25}).options == (2, 0.25)
    assert create("mine", {"scale": 2}).options == (2, 0.5)
    assert known() == tuple(sorted((*BUILT_IN, "mine")))


def test_a_factory_that_takes_any_option():
    register("mine", lambda **options: Mine(**options))
    assert create("mine", {"scale": 1}).options == (1, 0.5)


def test_registering_twice():
    register("mine", Mine)
    register("mine", Mine)
    with pytest.raises(ValueError, match="reducer 'mine' is registered already"):
        register("mine", lambda: Mine(1))
    with pytest.raises(ValueError, match="reducer 'uniform' is registered already"):
        register("uniform", Mine)
    with pytest.raises(ValueError, match="needs a name"):
        register("", Mine)
    with pytest.raises(TypeError, match="cannot be called: 3"):
        register("three", 3)


def test_an_installed_package_supplies_a_reducer(installed):
    installed(swift=f"{UniformReducer.__module__}:UniformReducer")
    assert create("swift") == UniformReducer()
    assert known() == tuple(sorted((*BUILT_IN, "swift")))


def test_an_installed_package_cannot_replace_a_built_in_one(installed):
    installed(uniform="no_such_module:Reducer")
    assert create("uniform") == UniformReducer()
    assert known().count("uniform") == 1


@pytest.mark.parametrize("value", ["no_such_module:Reducer", f"{UniformReducer.__module__}:Missing"])
def test_an_entry_point_that_cannot_be_loaded_is_named(installed, value):
    installed(broken=value)
    with pytest.raises(ImportError, match=f"reducer 'broken': its entry point '{value}' cannot be loaded"):
        create("broken")


@pytest.mark.parametrize(("name", "hint"), [("unifrom", "did you mean 'uniform'"), ("Random", "did you mean 'random'")])
def test_an_unknown_name_gets_the_nearest_one(name, hint):
    with pytest.raises(ValueError, match=f"unknown reducer '{name}'; {hint}.*{LISTED}"):
        create(name)


@settings(deadline=None)
@given(st.text().filter(lambda name: name not in known()))
def test_any_other_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"(?s)unknown reducer .* Known are {LISTED}"):
        create(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uniform", {"seed": 1}, "unknown option 'seed' of reducer 'uniform'; accepted: none"),
        ("random", {"sed": 1}, "unknown option 'sed' of reducer 'random'; accepted: seed"),
        ("random", {"name": "x"}, "unknown option 'name' of reducer 'random'; accepted: seed"),
        ("vispruner", {"share": 1}, "unknown option 'share' of reducer 'vispruner'; accepted: ratio"),
        ("divprune", {"ratio": 1}, "unknown option 'ratio' of reducer 'divprune'; accepted: none"),
        ("vispruner", {"ratio": 1.5}, "reducer 'vispruner': ratio must be from 0 to 1, not 1.5"),
        ("visionzip", {"contextual": -1}, "reducer 'visionzip': contextual must be from 0 to 1, not -1"),
        ("prumerge_plus", {"neighbours": -1}, "reducer 'prumerge_plus': neighbours must not be negative"),
        ("given", {}, "reducer 'given' needs the option 'indices'"),
        ("mine", {"ratio": 1, "scale": 1, "size": 2}, "unknown option 'size'.*accepted: scale, ratio"),
        ("mine", {"ratio": 1}, "reducer 'mine' needs the option 'scale'"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    register("mine", Mine)
    with pytest.raises(ValueError, match=message):
        create(name, options)


def test_a_wrong_option_value_is_the_reducers_own_error():
    with pytest.raises(TypeError, match="seed must be an integer, not 'a'"):
        create("random", {"seed": "a"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vispruner", {"ratio": "x"}, "ratio must be a number, not 'x'"),
        ("visionzip", {"contextual": True}, "contextual must be a number, not True"),
        ("prumerge", {"adaptive": 1}, "adaptive must be true or false, not 1"),
        ("prumerge", {"neighbours": 1.5}, "neighbours must be an integer, not 1.5"),
        ("cdpruner", {"relevance": "clip"}, "relevance must be an InstructionRelevance or a ClipRelevance, not 'clip'"),
        ("trim", {"relevance": None}, "relevance must be an InstructionRelevance or a ClipRelevance, not None"),
    ],
)
def test_option_values_of_a_wrong_type(name, options, message):
    with pytest.raises(TypeError, match=f"reducer '{name}': {message}"):
        create(name, options)


def test_fitting_reducers_require_no_more_than_there_is():
    assert fitting(frozenset()) == ("divprune", "random", "uniform")
    assert set(fitting(frozenset({"tiles"}))) == {"cdpruner", "divprune", "random", "uniform"}
    assert set(fitting(frozenset({"tiles", "features", "cls_attention"}))) == {
        *("cdpruner", "divprune", "random", "uniform", "vispruner")
    }
    register("mine", Mine)  # cannot be made without options
    assert fitting(OPTIONAL_FIELDS) == tuple(sorted(set(BUILT_IN) - {"given", "resize"}))


def test_a_factory_that_makes_no_reducer_is_named():
    register("mine", dict)
    with pytest.raises(TypeError, match=r"reducer 'mine': .* made a dict, which lacks"):
        create("mine")
