"""RobustBench's models, of a zoo that the tests bring along."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.backbones import describe
from clbench.nn.heads import classifier
from clbench.nn.robustbench import RobustBench

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Normalised(nn.Module):
    """A model as in the zoo: it normalises by itself, and its head has a name of its own."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.attention = nn.Linear(4, 4)
        self.logits = nn.Linear(4, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        features = self.attention(self.body((x - 0.5) / 0.25).mean((2, 3)))
        logits: Tensor = self.logits(features)
        return logits


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Puts a module robustbench there whose only model this is; returns what it is asked for."""

    def install(model: nn.Module) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def load_model(**options: Any) -> nn.Module:
            asked.update(options)
            return {"Standard": model}[options["model_name"]]

        utils = ModuleType("robustbench.utils")
        vars(utils)["load_model"] = load_model
        monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
        monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
        return asked

    return install


def test_a_model_of_the_zoo_answers_as_before(zoo: Any, tmp_path: Path) -> None:
    model = Normalised(10).eval()
    expected = model(IMAGES).detach()
    asked = zoo(model)
    backbone = RobustBench(load_head=True, model_dir=tmp_path)
    found = classifier(backbone, (3, 8, 8), 10).eval()
    assert found.head_loaded
    torch.testing.assert_close(found(IMAGES).detach(), expected)
    assert found.features.n_features == 4
    assert asked == {
        "model_name": "Standard",
        "model_dir": str(tmp_path),
        "dataset": "cifar10",
        "threat_model": "corruptions",
    }


def test_inputs_are_not_normalised_twice() -> None:
    backbone = RobustBench()
    assert (backbone.mean, backbone.std) == ((0.0,) * 3, (1.0,) * 3)
    given = RobustBench(mean=(0.5,) * 3, std=(0.2,) * 3)
    assert (given.mean, given.std) == ((0.5,) * 3, (0.2,) * 3)
    assert backbone.starts_trained


def test_results_say_where_it_comes_from(zoo: Any) -> None:
    zoo(Normalised(10))
    backbone = RobustBench()
    facts = describe(backbone, backbone.build((3, 8, 8)))
    assert facts["name"] == "robustbench/Standard"
    assert facts["norm_layers"] == ["BatchNorm2d"]
    assert facts["weights"]["threat_model"] == "corruptions"


def test_a_head_of_other_classes_is_left_out(zoo: Any) -> None:
    zoo(Normalised(10))
    assert not classifier(RobustBench(load_head=True), (3, 8, 8), 7).head_loaded


def test_an_unknown_name_is_refused(zoo: Any) -> None:
    zoo(Normalised(10))
    with pytest.raises(UserError, match=r"can't load Nobody.*KeyError"):
        RobustBench(name="Nobody").build((3, 8, 8))


def test_models_that_can_not_be_cut_are_refused(zoo: Any) -> None:
    zoo(Normalised(100))
    with pytest.raises(UserError, match="no linear layer of 10 outputs"):
        RobustBench().build((3, 8, 8))
    zoo(nn.Sequential(nn.Conv2d(3, 10, 3), nn.Linear(6, 10)))
    with pytest.raises(UserError, match="does not end in its linear layer"):
        RobustBench().build((3, 8, 8))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(UserError, match="pip install robustbench"):
        RobustBench().build((3, 8, 8))


def test_weights_of_a_file_do_not_go_with_it() -> None:
    with pytest.raises(UserError, match="weights of its own"):
        RobustBench(weights="model.pt")
