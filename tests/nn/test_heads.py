"""Heads by hand, and heads that come with a backbone's weights."""

import copy
import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.nn.heads import Classifier, CosineHead, classifier

SHAPE = (1, 4, 4)


def make(head="linear", n_classes=3, seed=0, **options) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return classifier(MLP(hidden=(5,), **options), SHAPE, n_classes, head)


def cosine(*shape: int, **options) -> CosineHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CosineHead(*shape, **options)


def save(model: nn.Module, path) -> str:
    save_file(model.state_dict(), path)
    return str(path)


def test_cosine_by_hand():
    head = cosine(2, 3, scale=4.0)
    head.weight.data = torch.tensor([[5.0, 0.0], [0.0, -1.0], [2.0, 2.0]])
    x = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    half = 4 * math.sqrt(0.5)
    expected = torch.tensor([[4.0, 0.0, half], [0.0, -4.0, half], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(head(x), expected)


def test_cosine_ignores_lengths():
    head = cosine(6, 4)
    longer = copy.deepcopy(head)
    longer.weight.data *= torch.tensor([[0.1], [1.0], [7.0], [100.0]])
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(longer(3 * x), head(x))
    assert head(x).abs().max() <= 10.0


@pytest.mark.parametrize("learnable", [False, True])
def test_cosine_scale(learnable):
    head = cosine(6, 4, scale=1.5, learnable=learnable)
    assert head.scale.item() == 1.5
    assert "scale" in head.state_dict()
    assert ("scale" in dict(head.named_parameters())) == learnable
    assert (head.in_features, head.out_features) == (6, 4)
    assert head.weight.abs().max() <= 1 / math.sqrt(6)


def test_classifier_is_the_head_of_the_features():
    model = make()
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert type(model.head) is nn.Linear
    assert torch.equal(model(x), model.head(model.features(x)))
    assert model(x).shape == (2, 3)
    assert not model.head_loaded
    assert type(make("cosine").head) is CosineHead


def test_the_head_does_not_change_the_features():
    linear, cosine = make(), make("cosine")
    for key, value in linear.features.state_dict().items():
        assert torch.equal(value, cosine.features.state_dict()[key])


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_head_is_loaded_only_when_asked(head, tmp_path):
    origin = make(head, seed=1)
    weights = save(origin, tmp_path / "w.safetensors")
    loaded = make(head, weights=weights, load_head=True)
    fresh = make(head, weights=weights)
    assert loaded.head_loaded
    assert not fresh.head_loaded
    for key, value in origin.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    assert not torch.equal(fresh.head.weight, origin.head.weight)
    assert torch.equal(fresh.features.layers[1].weight, origin.features.layers[1].weight)


@pytest.mark.parametrize("name", ["linear", "fc", "head", "classifier"])
def test_names_of_final_layers(name, tmp_path):
    origin = make(seed=1)
    state = {
        key.replace("head.", f"{name}.").removeprefix("features."): value
        for key, value in origin.state_dict().items()
    }
    save_file(state, tmp_path / "w.safetensors")
    loaded = make(weights=str(tmp_path / "w.safetensors"), load_head=True)
    assert torch.equal(loaded.head.weight, origin.head.weight)
    assert torch.equal(loaded.head.bias, origin.head.bias)


def test_head_of_other_classes_is_dropped_with_a_warning(tmp_path, caplog):
    weights = save(make(seed=1), tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING):
        model = make(n_classes=4, weights=weights, load_head=True)
    assert not model.head_loaded
    assert model.head.out_features == 4
    assert "3 outputs and the scenario 4 classes" in caplog.text


def test_no_head_to_load(tmp_path):
    weights = save(make().features, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no final layer"):
        make(weights=weights, load_head=True)


def test_two_final_layers(tmp_path):
    state = {**make().state_dict(), "fc.weight": torch.zeros(3, 5), "fc.bias": torch.zeros(3)}
    save_file(state, tmp_path / "w.safetensors")
    assert not make(weights=str(tmp_path / "w.safetensors")).head_loaded
    with pytest.raises(UserError, match="or several"):
        make(weights=str(tmp_path / "w.safetensors"), load_head=True)


def test_head_of_the_other_kind(tmp_path):
    weights = save(make("linear"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"CosineHead; missing: scale; unexpected: bias\."):
        make("cosine", weights=weights, load_head=True)


def test_user_mistakes():
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        make("cosin")
    with pytest.raises(UserError, match="at least one class"):
        make(n_classes=0)
