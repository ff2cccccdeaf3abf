"""From plain data to checked objects: what is refused, how it is said, what is never run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from suite import write_all

from clbench import userspace
from clbench.config import build, fill, options, target_class
from clbench.errors import UserError
from clbench.nn.backbones import MLP, Backbone
from clbench.testing import ToyScenario
from clbench.types import LOCATION, Scenario, Strategy, require

FINETUNE = {"_target_": "strategies.finetune.Finetune", "lr": 0.5}
DIGITS = {
    "_target_": "scenarios.digits.Digits",
    "backbone": {"_target_": "clbench.nn.backbones.MLP", "hidden": [8, 4]},
}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(kw_only=True)
class Options:
    """One field of every type that a configuration uses."""

    rate: float = 0.5
    count: int = 1
    switch: bool = False
    name: str = "a"
    maybe: str | None = None
    widths: tuple[int, ...] = (1,)
    pair: tuple[float, float] = (0.0, 1.0)
    choice: Literal["sgd", "adam"] = "sgd"
    colour: Colour = Colour.RED
    computed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        require(self, "rate", above=0, at_most=1)


ACCEPTED: list[tuple[str, Any, Any]] = [
    ("rate", 0.25, 0.25),
    ("rate", 1, 1.0),
    ("count", 3, 3),
    ("switch", True, True),
    ("maybe", None, None),
    ("maybe", "x", "x"),
    ("widths", [4, 5], (4, 5)),
    ("widths", [], ()),
    ("pair", [0, 0.5], (0.0, 0.5)),
    ("choice", "adam", "adam"),
    ("colour", "blue", Colour.BLUE),
]


@pytest.mark.parametrize(("key", "given", "expected"), ACCEPTED)
def test_values_of_the_right_type_arrive(key: str, given: Any, expected: Any) -> None:
    value = getattr(fill(Options, {key: given}, "node"), key)
    assert value == expected
    assert type(value) is type(expected)


REFUSED: list[tuple[str, Any, str]] = [
    ("rate", "0.1", "valid number"),
    ("rate", None, "valid number"),
    ("rate", True, "valid number"),
    ("rate", [0.1], "valid number"),
    ("count", 1.5, "valid integer"),
    ("count", 2.0, "valid integer"),
    ("count", "3", "valid integer"),
    ("count", True, "valid integer"),
    ("switch", 1, "valid boolean"),
    ("switch", "true", "valid boolean"),
    ("name", 3, "valid string"),
    ("name", None, "valid string"),
    ("widths", 4, "valid array"),
    ("widths", "45", "valid array"),
    ("widths", [4, 0.5], "valid integer"),
    ("pair", [1.0], "field required"),
    ("pair", [1.0, 2.0, 3.0], "at most 2 items"),
    ("choice", "rmsprop", "'sgd' or 'adam'"),
    ("choice", None, "'sgd' or 'adam'"),
    ("colour", "green", "'red' or 'blue'"),
    ("colour", {"a": 1}, "'red' or 'blue'"),
    ("rate", {1, 2}, "no plain value"),
    ("rate", float("inf"), "must be finite"),
    ("pair", [0.0, float("nan")], "must be finite"),
]


@pytest.mark.parametrize(("key", "given", "said"), REFUSED)
def test_values_of_another_type_are_refused(key: str, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        fill(Options, {key: given}, "node")
    assert str(refusal.value).startswith(f"node.{key}={given!r}")


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("inf"), float("nan")])
def test_values_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UserError) as refusal:
        fill(Options, {"rate": value}, "node")
    assert "rate" in str(refusal.value)
    with pytest.raises(UserError, match=r"rate=.* must be above 0 and at most 1"):
        Options(rate=value)


@pytest.mark.parametrize("key", ["computed", "_target_", "search", "__class__"])
def test_only_options_can_be_set(key: str) -> None:
    with pytest.raises(UserError, match=f"node.{key} is no option of Options"):
        fill(Options, {key: 1}, "node")


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError) as refusal:
        build({**FINETUNE, "momentun": 0.9}, Strategy, "strategy")
    assert "strategy.momentun is no option of Finetune" in str(refusal.value)
    assert "Did you mean 'momentum'?" in str(refusal.value)
    assert "weight_decay" in str(refusal.value)


def test_an_unknown_option_of_a_nested_node_is_refused_with_its_path() -> None:
    node = {**DIGITS, "backbone": {**DIGITS["backbone"], "hiden": [3]}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"scenario\.backbone\.hiden is no option of MLP"):
        build(node, Scenario, "scenario")


def test_a_nested_node_is_built_and_must_be_of_the_kind_of_its_field() -> None:
    built = build(DIGITS, Scenario, "scenario")
    assert vars(built)["backbone"] == MLP(hidden=(8, 4))
    with pytest.raises(UserError, match=r"scenario\.backbone\._target_.* is no Backbone"):
        build({**DIGITS, "backbone": FINETUNE}, Scenario, "scenario")
    with pytest.raises(UserError, match=r"scenario\.backbone='mlp' must be a group"):
        build({**DIGITS, "backbone": "mlp"}, Scenario, "scenario")


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UserError, match="scenario lacks backbone, which Digits needs"):
        build({"_target_": "scenarios.digits.Digits"}, Scenario, "scenario")


def test_the_search_space_is_no_option() -> None:
    built = build({**FINETUNE, "search": {"lr": "interval(0, 1)"}}, Strategy, "strategy")
    assert vars(built)["lr"] == 0.5


# What a configuration may name.

FOREIGN = [
    "os.system",
    "shutil.copyfile",
    "builtins.exec",
    "subprocess.Popen",
    "torch.nn.Linear",
    "strategies",
    "strategiesx.finetune.Finetune",
    "",
    ".strategies.finetune.Finetune",
    "strategies..finetune.Finetune",
    "strategies/../os.system",
    "strategies.finetune/../../os.system",
    "../strategies.finetune.Finetune",
    "/etc/passwd",
    "strategies.finetune.Finetune()",
    "strategies.finetune.Fine tune",
    "clbench.os;system",
]
#: In our namespaces, but no class that describes a strategy.
IMPOSTORS = [
    "clbench.files.write_atomically",
    "clbench.config.build",
    "clbench.machine.os",
    "clbench.machine.subprocess",
    "clbench.samples.Batch",
    "clbench.types.Context",
    "clbench.nn.backbones.MLP",
    "clbench.testing.ToyScenario",
    "strategies.finetune.__doc__",
    "strategies.finetune.dataclass",
    "strategies.finetune.Nothing",
    "strategies.Nothing",
]


@pytest.mark.parametrize("path", FOREIGN)
def test_a_name_outside_our_namespaces_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"_target_|is refused"):
        build({"_target_": path}, Strategy, "strategy")


@pytest.mark.parametrize("path", IMPOSTORS)
def test_what_is_no_strategy_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="is no Strategy"):
        build({"_target_": path}, Strategy, "strategy")


@pytest.mark.parametrize("target", [None, 3, ["strategies.finetune.Finetune"], {}])
def test_a_target_must_be_a_name(target: Any) -> None:
    with pytest.raises(UserError, match="strategy lacks _target_"):
        build({"_target_": target}, Strategy, "strategy")


@pytest.mark.parametrize("path", ["clbench.types.Strategy", "clbench.training.GradientStrategy"])
def test_an_abstract_class_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="is abstract: it lacks"):
        build({"_target_": path}, Strategy, "strategy")


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("strategies.ewcc.EWC", "strategies/ewcc.py"),
        ("strategies.finetune.inner.Finetune", "strategies/finetune/inner.py"),
        ("clbench.nowhere.Thing", "clbench/nowhere.py"),
    ],
)
def test_a_file_that_is_not_there_is_named(path: str, file: str) -> None:
    with pytest.raises(UserError, match=f"there is no {file}"):
        build({"_target_": path}, Strategy, "strategy")


@pytest.mark.usefixtures("fresh")
def test_refused_names_are_not_even_imported(work: Path) -> None:
    canary = "from pathlib import Path\nPath('canary').touch()\nclass Bird:\n    pass\n"
    write_all(work, {"bird.py": canary, "nest/bird.py": canary})
    sys.path.append(str(work))
    for path in ("bird.Bird", "nest.bird.Bird", "strategies.finetune.Finetune/../bird.Bird"):
        with pytest.raises(UserError):
            build({"_target_": path}, Strategy, "strategy")
    with pytest.raises(UserError):
        build({"_target_": "os.system", "command": "touch canary"}, Strategy, "strategy")
    with pytest.raises(UserError):
        build({"_target_": "os.system", "_args_": ["touch canary"]}, Strategy, "strategy")
    assert not (work / "canary").exists()
    assert "bird" not in sys.modules


def test_hydra_s_own_keys_do_nothing(work: Path) -> None:
    for extra in ({"_args_": [1]}, {"_partial_": True}, {"_recursive_": False}):
        with pytest.raises(UserError, match="is no option of Finetune"):
            build({**FINETUNE, **extra}, Strategy, "strategy")
    with pytest.raises(UserError):
        build({**FINETUNE, "lr": {"_target_": "os.mkdir", "path": "canary"}}, Strategy, "strategy")
    assert os.listdir(work) == []


# The user's own classes.

MINE = """
from dataclasses import dataclass
from clbench.training import GradientStrategy

@dataclass(kw_only=True)
class Mine(GradientStrategy):
    strength: float = 1.0
"""


@pytest.fixture
def own(work: Path, fresh: None) -> Callable[[str], None]:  # noqa: ARG001
    """Writes strategies/mine.py into the user's working folder, as if a new process began."""

    def write(text: str) -> None:
        for name in [n for n in sys.modules if n == "strategies.mine"]:
            del sys.modules[name]
        write_all(work, {"strategies/mine.py": text})
        # A file changed within a second would else be taken from the bytecode cache.
        for cached in work.rglob("*.pyc"):
            cached.unlink()
        userspace.join(work)

    return write


def test_the_identity_of_a_foreign_class_has_its_code_in_it(own: Callable[[str], None]) -> None:
    node = {"_target_": "strategies.mine.Mine", "strength": 2.0}
    own(MINE)
    first = options(build(node, Strategy, "strategy"))
    own(MINE)
    assert options(build(node, Strategy, "strategy")) == first
    own(MINE + "# another thought\n")
    second = options(build(node, Strategy, "strategy"))
    assert first["_target_"] == second["_target_"] == "strategies.mine.Mine"
    assert first["strength"] == 2.0
    assert re.fullmatch("[0-9a-f]{16}", first["_code_"])
    assert first["_code_"] != second["_code_"]


def test_the_suite_s_classes_carry_no_code() -> None:
    assert "_code_" not in options(build(FINETUNE, Strategy, "strategy"))
    nested = options(build(DIGITS, Scenario, "scenario"))
    assert "_code_" not in nested
    assert "_code_" not in nested["backbone"]


def test_a_missing_package_is_named(own: Callable[[str], None]) -> None:
    own("import no_such_package_here\n" + MINE)
    with pytest.raises(UserError, match="needs the package no_such_package_here, which is not"):
        build({"_target_": "strategies.mine.Mine"}, Strategy, "strategy")


def test_a_mistake_in_the_user_s_file_keeps_its_traceback(own: Callable[[str], None]) -> None:
    own("this is no Python\n")
    with pytest.raises(SyntaxError):
        build({"_target_": "strategies.mine.Mine"}, Strategy, "strategy")


def test_a_class_that_lacks_a_method_is_named_abstract(own: Callable[[str], None]) -> None:
    own(
        "from dataclasses import dataclass\nfrom clbench.types import Strategy\n"
        "@dataclass(kw_only=True)\nclass Mine(Strategy):\n"
        "    def setup(self, model, context): pass\n"
    )
    with pytest.raises(UserError, match="is abstract: it lacks learn, predict"):
        build({"_target_": "strategies.mine.Mine"}, Strategy, "strategy")


def test_a_class_that_is_no_dataclass_is_refused(own: Callable[[str], None]) -> None:
    own("class Mine:\n    pass\n")
    with pytest.raises(UserError, match=r"is no Strategy \(a dataclass of that kind\)"):
        build({"_target_": "strategies.mine.Mine"}, Strategy, "strategy")


# And back to plain data.


def plain(node: Mapping[str, Any]) -> dict[str, Any]:
    """Without the hash of the code, as a configuration file would say it."""
    content = json.loads(json.dumps({k: v for k, v in node.items() if k != "_code_"}))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("node", "kind"),
    [(FINETUNE, Strategy), (DIGITS, Scenario)],
    ids=["flat", "nested"],
)
def test_options_build_it_again(node: Mapping[str, Any], kind: type[Any]) -> None:
    built = build(node, kind, "node")
    again = build(plain(options(built)), kind, "node")
    assert again == built
    assert again is not built
    assert options(again) == options(built)


def test_options_of_a_class_of_the_engine_build_it_again() -> None:
    toy = ToyScenario(epochs=2, backbone=MLP(hidden=(3,)))
    assert build(plain(options(toy)), Scenario, "scenario") == toy


def test_options_are_plain_data() -> None:
    @dataclass(kw_only=True)
    class Holder(ABC):
        inner: Options = field(default_factory=Options)

        @abstractmethod
        def nothing(self) -> None: ...

    class Holding(Holder):
        def nothing(self) -> None: ...

    node = options(Holding(inner=Options(colour=Colour.BLUE, widths=(2, 3))))
    assert node["inner"]["colour"] == "blue"
    assert node["inner"]["widths"] == [2, 3]
    assert node["inner"]["maybe"] is None
    assert "computed" not in node["inner"]
    assert json.loads(json.dumps(node)) == node


def test_where_a_file_lies_is_no_option() -> None:
    @dataclass(kw_only=True)
    class Located:
        folder: str = field(default="data", metadata=LOCATION)
        classes: int = 10

    assert "folder" not in options(Located())
    assert options(Located(folder="elsewhere")) == options(Located())
    assert options(Located(classes=11)) != options(Located())


def test_what_a_file_of_weights_holds_is_an_option_and_not_its_name(tmp_path: Path) -> None:
    one, same, other = (tmp_path / f"{name}.pt" for name in ("one", "same", "other"))
    for file, content in ((one, b"1"), (same, b"1"), (other, b"2")):
        file.write_bytes(content)

    def said(file: Path) -> dict[str, Any]:
        return options(MLP(weights=str(file)))

    assert said(one) == said(same) != said(other)
    assert said(one)["weights"] == f"sha256:{hashlib.sha256(b'1').hexdigest()}"
    one.write_bytes(b"22")
    assert said(one)["weights"] == f"sha256:{hashlib.sha256(b'22').hexdigest()}"
    assert said(tmp_path / "none.pt")["weights"] == str(tmp_path / "none.pt")
    assert options(MLP())["weights"] is None


def test_target_class_gives_the_class_itself() -> None:
    assert target_class(DIGITS["backbone"], Backbone, "b") is MLP  # type: ignore[arg-type]


def test_options_see_a_change() -> None:
    toy = ToyScenario()
    assert options(toy) == options(replace(toy))
    assert options(toy) != options(replace(toy, noise=toy.noise + 1))
