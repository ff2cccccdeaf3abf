"""Change of modules within experiences and across switches, against numbers made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from clbench.nn.backbones import ResNet
from clbench.nn.heads import Classifier
from clbench.nn.sensitivity import Sensitivity, Unit, units


@pytest.fixture
def model() -> nn.Module:
    """A weight matrix of two numbers with a bias, and a batch norm of one channel."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    put(model, [0, 0, 0], [0, 0], [0, 0])
    return model


Row = Sequence[float]


def put(model: nn.Module, linear: Row, norm: Row, statistics: Row) -> None:
    values = {
        "0.weight": [linear[:2]],
        "0.bias": linear[2:],
        **{"1.weight": norm[:1], "1.bias": norm[1:]},
        **{"1.running_mean": statistics[:1], "1.running_var": statistics[1:]},
    }
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    model.load_state_dict(tensors, strict=False)


def test_units_are_modules_and_running_statistics(model: nn.Module) -> None:
    assert units(model) == [
        Unit("0", "linear", ("0.weight", "0.bias"), 3),
        Unit("1", "norm", ("1.weight", "1.bias"), 2),
        Unit("1.statistics", "statistics", ("1.running_mean", "1.running_var"), 2),
    ]


def test_a_residual_network_has_the_kinds_that_the_paper_speaks_of() -> None:
    model = Classifier(ResNet(3, (4, 8), 1, "cifar", "projection"), nn.Linear(8, 2))
    found = units(model)
    kinds = {kind: [u.name for u in found if u.kind == kind] for kind in {u.kind for u in found}}
    convolutions = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]
    assert kinds["convolution"] == [
        f"features.{name}" for name in [*convolutions, "layer2.0.downsample.0"]
    ]
    norms = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2"]
    assert kinds["norm"] == [f"features.{name}" for name in [*norms, "layer2.0.downsample.1"]]
    assert kinds["statistics"] == [f"{name}.statistics" for name in kinds["norm"]]
    assert kinds["linear"] == ["head"]
    assert set(kinds) == {"convolution", "norm", "statistics", "linear"}
    trained = sum(u.size for u in found if u.kind != "statistics")
    assert trained == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(3), "norm"),
        (nn.GroupNorm(1, 3), "norm"),
        (nn.Conv1d(3, 3, 1), "convolution"),
        (nn.Embedding(3, 3), "other"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_single_modules(module: nn.Module, kind: str) -> None:
    assert [u.kind for u in units(nn.Sequential(module))] == [kind]
    assert [u.name for u in units(module)] == ["model"]


def test_a_shared_parameter_belongs_to_the_first() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    found = units(nn.Sequential(one, two))
    assert [u.tensors for u in found] == [("0.weight", "0.bias"), ("1.bias",)]


def test_statistics_that_are_not_kept_are_no_unit() -> None:
    found = units(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)))
    assert [u.name for u in found] == ["0"]


def walked(model: nn.Module) -> Sensitivity:
    """Two experiences of three intervals; the linear layer jumps at the switch."""
    measured = Sensitivity(model)
    measured.begin()
    for linear, norm, statistics in [
        ([1, 1, 1], [1, 0], [0, 0]),
        ([1, 2, 3], [1, 1], [0, 0]),  # changes: 3/3, 1/2, 0
        ([2, 2, 1], [0, 1], [0, 0]),  # 3/3, 1/2, 0
    ]:
        put(model, linear, norm, statistics)
        measured.mark()
    measured.end()
    measured.begin()
    for linear, norm, statistics in [
        ([8, 2, 1], [0, 1], [4, 0]),
        ([8, 2, 4], [0, 3], [6, 2]),  # 3/3, 2/2, 4/2
        ([8, -4, 1], [2, 3], [6, 2]),  # 9/3, 2/2, 0
    ]:
        put(model, linear, norm, statistics)
        measured.mark()
    measured.end()
    return measured


def test_change_within_and_across_by_hand(model: nn.Module) -> None:
    """Across, from [2, 2, 1], [0, 1], [0, 0] to [8, -4, 1], [2, 3], [6, 2]: 12/3, 4/2, 8/2."""
    measured = walked(model)
    assert [row.tolist() for row in measured.within] == [[1, 0.5, 0], [2, 1, 1]]
    assert [row.tolist() for row in measured.across] == [[4, 2, 4]]
    assert measured.scores() == [4 / 1.5, 2 / 0.75, 4 / 0.5]


def test_facts_are_plain_data(model: nn.Module) -> None:
    facts = walked(model).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts[2] == {
        "name": "1.statistics",
        "kind": "statistics",
        "size": 2,
        "within": [0, 1],
        "across": [4],
        "score": 8,
    }


def test_what_is_done_aside_is_not_counted(model: nn.Module) -> None:
    measured = Sensitivity(model)

    def move(by: float) -> None:
        model.state_dict()["0.weight"].add_(by)

    for _ in range(2):
        measured.begin()
        for _ in range(3):
            move(1)
            with measured.aside():
                move(100)
            measured.mark()
        measured.end()
        with measured.aside():
            move(-50)
    # Two of three numbers move by 1 in each interval.
    assert measured.within[1][0] == pytest.approx(2 / 3)
    assert measured.across[0][0] == pytest.approx(2)
    assert measured.scores()[0] == pytest.approx(3)


def test_what_is_not_known_is_none(model: nn.Module) -> None:
    measured = Sensitivity(model)
    assert measured.scores() == [None, None, None]
    measured.begin()
    put(model, [1, 1, 1], [1, 1], [0, 0])
    measured.mark()
    measured.end()
    assert all(math.isnan(x) for x in measured.within[0].tolist())
    assert measured.scores() == [None, None, None]
    assert [fact["within"] for fact in measured.facts()] == [[None], [None], [None]]
    # Statistics that never move: 0/0.
    measured.begin()
    for value in (2.0, 3.0):
        put(model, [value] * 3, [1, 1], [0, 0])
        measured.mark()
    measured.end()
    assert measured.scores() == [2, None, None]


def test_state_comes_back(model: nn.Module) -> None:
    measured = walked(model)
    other = Sensitivity(model)
    other.load_state_dict(measured.state_dict())
    assert other.facts() == measured.facts()
