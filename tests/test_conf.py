"""Every YAML of the suite composes, says all options of its class, and says them rightly."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from omegaconf import OmegaConf
from suite import composed, configured

from clbench import userspace
from clbench.config import RESERVED, build, target_class
from clbench.nn.backbones import Backbone
from clbench.text.decoders import Decoder
from clbench.types import Scenario, Strategy

KINDS: dict[str, type[Any]] = {
    "scenario": Scenario,
    "strategy": Strategy,
    "backbone": Backbone,
    "language_model": Decoder,
}
#: A scenario that has a part of this group, where the default scenario has none.
WITHIN = {"language_model": ["scenario=string_instructions"]}
EVERY_YAML = pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in KINDS for name in configured(group)]
)
EVERY_SCENARIO = pytest.mark.parametrize("name", configured("scenario"))


def raw(group: str, name: str) -> dict[str, Any]:
    """A YAML as it stands, nothing composed."""
    content = OmegaConf.to_container(
        OmegaConf.load(userspace.configuration() / group / f"{name}.yaml"), resolve=False
    )
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def nodes(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node that configures a class, with its path."""
    if "_target_" in tree:
        yield where, tree
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from nodes(value, f"{where}.{key}" if where else key)


def class_of(node: Mapping[str, Any]) -> type[Any]:
    return target_class(node, object, "node")


def module_of(group: str, name: str) -> list[str]:
    """["strategies", "ewc"] for conf/strategy/ewc.yaml."""
    return str(raw(group, name)["_target_"]).split(".")[:-1]


@EVERY_YAML
def test_composes_and_builds(group: str, name: str) -> None:
    tree = composed(f"{group}={name}", *WITHIN.get(group, []))
    for part in ("scenario", "strategy"):
        assert isinstance(build(tree[part], KINDS[part], part), KINDS[part])
    assert tree[group]["_target_"] == raw(group, name)["_target_"]
    if group not in ("scenario", "strategy"):
        assert tree["scenario"][group]["_target_"] == raw(group, name)["_target_"]


@EVERY_YAML
def test_lists_every_field_of_its_class_and_nothing_else(group: str, name: str) -> None:
    seen = 0
    for where, node in nodes(composed(f"{group}={name}", *WITHIN.get(group, []))[group], group):
        target = class_of(node)
        assert is_dataclass(target)
        options = {f.name for f in fields(target) if f.init}
        assert set(node) - set(RESERVED) == options, where
        seen += 1
    assert seen


@pytest.mark.parametrize("name", configured("strategy"))
def test_search_space_names_fields_and_values_that_build(name: str) -> None:
    """Every end of an interval and every choice is a value that the class accepts."""
    node = composed(f"strategy={name}")["strategy"]
    space = node.get("search") or {}
    parser = OverridesParser.create()
    for key, text in space.items():
        (override,) = parser.parse_overrides([f"{key}={text}"])
        assert override.is_sweep_override(), f"{key}: {text} is one value, no space"
        sweep = override.value()
        if isinstance(sweep, ChoiceSweep):
            values = list(override.sweep_iterator())
        elif isinstance(sweep, RangeSweep):
            values = list(sweep.range())
        else:
            assert isinstance(sweep, IntervalSweep)
            assert sweep.start is not None
            assert sweep.end is not None
            values = [sweep.start, sweep.end]
            assert not ("log" in sweep.tags and sweep.start <= 0), "no logarithm of that"
        assert len(values) > 1, f"{key} has nothing to choose from"
        for value in values:
            build(with_value(node, str(key), value), Strategy, "strategy")


def with_value(node: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a node with one option, possibly of a nested node, set."""
    head, _, rest = path.partition(".")
    assert head in node, f"{head} is no option"
    return {**node, head: with_value(node[head], rest, value) if rest else value}


@pytest.mark.parametrize("name", configured("strategy"))
def test_a_strategy_and_its_variants_have_the_name_of_their_file(name: str) -> None:
    """conf/strategy/ewc.yaml and ewc_online.yaml configure strategies/ewc.py.

    A variant that has a name of its own elsewhere may keep it, if the class says so.
    """
    package, file = module_of("strategy", name)
    assert package == "strategies"
    said = f"`strategy={name}`" in (inspect.getdoc(class_of(raw("strategy", name))) or "")
    assert name == file or name.startswith(f"{file}_") or said
    assert file in configured("strategy"), f"{file}.py has no YAML of its name"


@EVERY_SCENARIO
def test_a_scenario_lies_among_the_scenarios(name: str) -> None:
    assert module_of("scenario", name)[0] == "scenarios"


@pytest.mark.parametrize("kind", userspace.PLUGINS)
def test_every_plugin_can_be_chosen(kind: str) -> None:
    group = {"strategies": "strategy", "scenarios": "scenario"}[kind]
    files = {file.stem for file in (userspace.suite() / kind).rglob("*.py")}
    used = {module_of(group, name)[-1] for name in configured(group)}
    assert files == used


@EVERY_SCENARIO
def test_a_scenario_states_where_its_data_come_from(name: str) -> None:
    documentation = inspect.getdoc(class_of(raw("scenario", name))) or ""
    source = re.search(r"^Source: (.+?)(?=^\w+: |\Z)", documentation, re.M | re.S)
    assert source, "no line 'Source: ...'"
    words = ["Licence"]
    if "user" not in source[1]:
        words += ["Sizes", "Splits"]
    for word in words:
        assert re.search(rf"^{word}: \S", documentation, re.M), f"no line '{word}: ...'"


@pytest.mark.parametrize("name", configured("strategy"))
def test_a_strategy_documents_itself_and_each_of_its_options(name: str) -> None:
    target = class_of(raw("strategy", name))
    assert "**Differs from the paper:**" in (inspect.getdoc(target) or "")
    documented = "\n".join(inspect.getdoc(kind) or "" for kind in target.__mro__)
    for option in (f.name for f in fields(target) if f.init):
        assert re.search(rf"^\s+{option}: ", documented, re.M), f"{option} is not explained"


def test_every_option_of_config_yaml_has_a_default_and_is_read() -> None:
    tree = composed()
    from clbench.commands.phases import Command
    from clbench.composing import GROUPS
    from clbench.conditions import Conditions
    from clbench.limits import Limits

    own = {f.name for kind in (Command, Conditions, Limits) for f in fields(kind)}
    assert set(tree) == own | set(GROUPS) - WITHIN.keys()


def test_the_conditions_of_config_yaml_are_the_defaults_of_the_class() -> None:
    from clbench.conditions import Conditions
    from clbench.config import fill

    names = {f.name for f in fields(Conditions)}
    written = {key: value for key, value in composed().items() if key in names}
    assert fill(Conditions, written, "") == Conditions()


def test_target_classes_are_spelt_where_they_are_defined() -> None:
    """A re-exported class would have another identity in results."""
    for group in KINDS:
        for name in configured(group):
            path = raw(group, name)["_target_"]
            target = class_of({"_target_": path})
            assert path == f"{target.__module__}.{target.__qualname__}"
            assert Path(inspect.getfile(importlib.import_module(target.__module__))).exists()
