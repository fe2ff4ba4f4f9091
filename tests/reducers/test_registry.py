"""Reducers by name."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import (
    ENTRY_POINT_GROUP,
    GivenReducer,
    RandomReducer,
    Selection,
    UniformReducer,
    create,
    known,
    register,
    registry,
)


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
    assert known() == ("given", "mine", "random", "uniform")


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
    assert known() == ("given", "random", "swift", "uniform")


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
    with pytest.raises(ValueError, match=f"unknown reducer '{name}'; {hint}.*given, random, uniform"):
        create(name)


@given(st.text().filter(lambda name: name not in known()))
def test_any_other_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown reducer .* Known are given, random, uniform"):
        create(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uniform", {"seed": 1}, "unknown option 'seed' of reducer 'uniform'; accepted: none"),
        ("random", {"sed": 1}, "unknown option 'sed' of reducer 'random'; accepted: seed"),
        ("random", {"name": "x"}, "unknown option 'name' of reducer 'random'; accepted: seed"),
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


def test_a_factory_that_makes_no_reducer_is_named():
    register("mine", dict)
    with pytest.raises(TypeError, match=r"reducer 'mine': .* made a dict, which lacks"):
        create("mine")
