"""torchvision's classifiers: their own files give their own answers; mistakes are named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from clbench.errors import UserError
from clbench.nn.backbones import describe
from clbench.nn.heads import classifier
from clbench.nn.torchvision_models import TorchVision

RGB = (3, 32, 32)


def images(shape: tuple[int, int, int] = RGB) -> Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))


def made(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: nn.Module = models.get_model(name, **options)
    return model.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file as torchvision publishes them: the state dict of the whole classifier."""
    torch.save(made("resnet18").state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def test_a_published_file_gives_the_whole_classifier(file: Path) -> None:
    backbone = TorchVision(name="resnet18", weights=str(file), load_head=True)
    with torch.random.fork_rng():
        model = classifier(backbone, RGB, 1000).eval()
    torch.testing.assert_close(model(images()), made("resnet18")(images()), rtol=0, atol=0)
    assert model.head_loaded
    assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    facts = describe(backbone, model.features)
    assert (facts["name"], facts["weights"]["file"]) == ("torchvision/resnet18", "resnet18.pth")
    assert (facts["n_features"], facts["resized_to"]) == (512, None)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "efficientnet_b0", "vgg11", "convnext_tiny"]
)
def test_other_families_lose_their_last_layer_alone(name: str) -> None:
    with torch.random.fork_rng():
        extractor, head = TorchVision(name=name).build_with_head((3, 64, 64))
    assert extractor(images((3, 64, 64))).shape == (2, extractor.n_features)
    assert head == {}, "a random layer is no head of weights"


def test_images_in_the_size_of_the_weights() -> None:
    backbone = TorchVision(name="vit_b_32", input_size="weights")
    with torch.random.fork_rng():
        extractor = backbone.build(RGB).eval()
    assert extractor.size == (224, 224)
    with torch.no_grad():
        assert extractor(images()).shape == (2, 768)


def test_the_tag_decides_what_images_are_prepared_for() -> None:
    other = TorchVision(name="vit_b_16", tag="IMAGENET1K_SWAG_LINEAR_V1", weights="w.pth")
    assert other.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"name": "resnet19"},
            r"torchvision .* has no such classifier\. Did you mean 'resnet1[08]'",
        ),
        ({"name": "fcn_resnet50"}, "has no such classifier"),
        ({"name": "resnet18", "tag": "IMAGENET"}, r"no such weights of resnet18.*IMAGENET1K_V1"),
        ({"name": "resnet18", "pretrained": True, "weights": "w.pth"}, "give one of them"),
    ],
)
def test_mistakes_stop_before_anything_is_loaded(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TorchVision(**options)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("resnet18", (1, 28, 28), "reads three channels"),
        ("vit_b_16", RGB, r"can't read images of shape \(3, 32, 32\).*input_size=weights"),
        ("squeezenet1_0", (3, 64, 64), "no linear layer of 1000 outputs"),
    ],
)
def test_what_can_t_be_built_says_why(name: str, shape: tuple[int, int, int], says: str) -> None:
    with torch.random.fork_rng(), pytest.raises(UserError, match=says):
        TorchVision(name=name).build(shape)


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    state = made("resnet18").state_dict()
    state["bn1.gain"] = state.pop("bn1.weight")
    torch.save(state, tmp_path / "w.pth")
    with torch.random.fork_rng(), pytest.raises(UserError, match=r"bn1\.weight.*bn1\.gain"):
        TorchVision(name="resnet18", weights=str(tmp_path / "w.pth")).build(RGB)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights that torchvision fetches from a folder, its name ending in its SHA-256."""
    weights = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.save(made("shufflenet_v2_x0_5").state_dict(), tmp_path / "w")
    digest = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    file = (tmp_path / "w").rename(tmp_path / f"shufflenet-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights.value, "url", file.as_uri())
    return file


SMALL = {"name": "shufflenet_v2_x0_5", "pretrained": True, "load_head": True}


def test_weights_are_fetched_once_and_remembered(published: Path) -> None:
    with torch.random.fork_rng():
        model = classifier(TorchVision(**SMALL), RGB, 1000).eval()
    torch.testing.assert_close(
        model(images()), made("shufflenet_v2_x0_5")(images()), rtol=0, atol=0
    )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert (folder / "clbench.sha256").read_text() == f"{digest}  {published.name}\n"
    published.unlink()
    with torch.random.fork_rng():
        TorchVision(**SMALL).build(RGB)
    content = bytearray((folder / published.name).read_bytes())
    content[1000] ^= 1
    (folder / published.name).write_bytes(content)
    with torch.random.fork_rng(), pytest.raises(UserError, match=r"another file .* its name says"):
        TorchVision(**SMALL).build(RGB)


class Canary:
    """Says that it was unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.place,)


def test_fetched_weights_execute_nothing(published: Path, tmp_path: Path) -> None:
    torch.save({"conv1": Canary(tmp_path / "executed")}, published)
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    evil = published.rename(tmp_path / f"shufflenet-{digest[:8]}.pth")
    models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.value.url = evil.as_uri()
    with torch.random.fork_rng(), pytest.raises(UserError, match="can't be read"):
        TorchVision(**SMALL).build(RGB)
    assert not (tmp_path / "executed").exists()


def test_without_a_network_a_place_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Connection refused")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    backbone = TorchVision(name="resnet18", pretrained=True)
    assert backbone.published() is not None
    says = (
        r"resnet18-f37072fd\.pth can't be fetched: .*Connection refused.* put it at .*checkpoints"
    )
    with pytest.raises(UserError, match=says):
        backbone.build(RGB)
