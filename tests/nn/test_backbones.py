"""Backbones: published sizes, hand-worked shortcuts, weight files, timm."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.config import build as build_node
from clbench.config import target_class
from clbench.errors import UserError
from clbench.nn.backbones import (
    MLP,
    Backbone,
    BasicBlock,
    CifarResNet,
    FeatureExtractor,
    ResNet18,
    SlimResNet18,
    Timm,
    ZeroPadShortcut,
    describe,
)
from clbench.nn.heads import classifier

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
RGB = (3, 32, 32)
OWN = {
    "mlp": MLP(hidden=(12, 8)),
    "slim": SlimResNet18(width=4),
    "resnet18": ResNet18(),
    "imagenet_stem": ResNet18(stem="imagenet"),
    "resnet20": CifarResNet(),
}


def tiny_vit(**options: object) -> Timm:
    return Timm(name="vit_tiny_patch16_224", patch_size=4, **options)  # type: ignore[arg-type]


def build(backbone: Backbone, shape: tuple[int, int, int] = RGB, seed: int = 0) -> FeatureExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return backbone.build(shape)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(shape: tuple[int, int, int], n: int = 2) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def saved(module: nn.Module, path: Path) -> str:
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
    return str(path)


@pytest.fixture(autouse=True)
def _global_generator_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    """Weights of a convolution without bias and of the batch norm behind it."""
    return inputs * outputs * kernel**2 + 2 * outputs


@pytest.mark.parametrize(
    ("depth", "published", "exact"), [(20, 0.27, 269_722), (32, 0.46, 464_154), (56, 0.85, 853_018)]
)
def test_cifar_resnet_has_the_published_size(depth, published, exact):
    n = (depth - 2) // 6
    by_hand = conv(3, 16) + 2 * n * conv(16, 16)
    by_hand += conv(16, 32) + (2 * n - 1) * conv(32, 32)
    by_hand += conv(32, 64) + (2 * n - 1) * conv(64, 64)
    by_hand += 64 * 10 + 10
    model = classifier_of(CifarResNet(depth=depth), RGB, 10)
    assert size(model) == by_hand == exact
    assert round(exact / 1e6, 2) == published


def classifier_of(backbone: Backbone, shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    with torch.random.fork_rng():
        return classifier(backbone, shape, n_classes)


def test_slim_resnet18_size():
    stages = [(20, 20), (20, 40), (40, 80), (80, 160)]
    by_hand = conv(3, 20) + sum(conv(i, o) + 3 * conv(o, o) for i, o in stages)
    by_hand += sum(conv(i, o, 1) for i, o in stages[1:]) + 160 * 10 + 10
    assert size(classifier_of(SlimResNet18(), RGB, 10)) == by_hand == 1_094_750


def test_resnet18_sizes():
    assert size(classifier_of(ResNet18(stem="imagenet"), (3, 64, 64), 1000)) == 11_689_512
    stems = 3 * 64 * (7**2 - 3**2)
    heads = 513 * (1000 - 10)
    assert size(classifier_of(ResNet18(), RGB, 10)) == 11_689_512 - stems - heads


def test_mlp_size_and_values():
    assert size(classifier_of(MLP(), (1, 28, 28), 10)) == 785 * 400 + 401 * 400 + 401 * 10
    extractor = build(MLP(hidden=(1,)), (1, 1, 2))
    extractor.load_state_dict(
        {"layers.1.weight": torch.tensor([[1.0, -2.0]]), "layers.1.bias": torch.tensor([0.5])}
    )
    x = torch.tensor([[[[1.0, 0.5]]], [[[1.0, 2.0]]]])
    assert extractor(x).tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 84, 84)])
@pytest.mark.parametrize("name", OWN)
def test_any_image_size(name, shape):
    extractor = build(OWN[name], shape)
    out = extractor(images(shape))
    assert out.shape == (2, extractor.n_features)
    assert out.isfinite().all()


def test_zero_pad_shortcut_by_hand():
    x = torch.arange(18.0).view(1, 2, 3, 3)
    out = ZeroPadShortcut(extra=3, stride=2)(x)
    zero = [[0.0, 0.0], [0.0, 0.0]]
    assert out.tolist() == [
        [zero, [[0.0, 2.0], [6.0, 8.0]], [[9.0, 11.0], [15.0, 17.0]], zero, zero]
    ]


@pytest.mark.parametrize("shortcut", ["zero_pad", "projection"])
def test_block_with_a_silent_branch_is_its_shortcut(shortcut):
    with torch.random.fork_rng():
        block = BasicBlock(1, 3, 2, shortcut)
    nn.init.zeros_(block.bn2.weight)
    if shortcut == "projection":
        nn.init.constant_(block.downsample[0].weight, -2.0)
    x = torch.tensor([[[[1.0, -9.0], [-9.0, -9.0]]], [[[-3.0, 9.0], [9.0, 9.0]]]])
    out = block.eval()(x).flatten(1)
    # A fresh batch norm divides by sqrt(1 + its epsilon).
    expected = {"zero_pad": [[0, 1, 0], [0, 0, 0]], "projection": [[0, 0, 0], [6, 6, 6]]}[shortcut]
    torch.testing.assert_close(out, torch.tensor(expected) * 1.0, rtol=1e-5, atol=0)


def test_block_convolves_twice_by_hand():
    with torch.random.fork_rng():
        block = BasicBlock(1, 1, 1, "zero_pad").eval()
    for convolution, weight in ((block.conv1, 3.0), (block.conv2, -0.5)):
        nn.init.zeros_(convolution.weight)
        convolution.weight.data[0, 0, 1, 1] = weight
    # relu(x - 0.5 relu(3 x)): 2 -> relu(2 - 3) = 0; -2 -> relu(-2 - 0) = 0; after the sign of
    # the second weight is turned, 2 -> 2 + 3 = 5.
    x = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1)
    assert block(x).flatten().tolist() == [0.0, 0.0]
    block.conv2.weight.data.neg_()
    torch.testing.assert_close(block(x).flatten(), torch.tensor([5.0, 0.0]), rtol=1e-4, atol=0)


def test_slim_resnet_pools_like_its_origin_at_32_pixels():
    extractor = build(SlimResNet18(width=4)).eval()
    maps: list[Tensor] = []
    extractor.get_submodule("layer4").register_forward_hook(lambda *call: maps.append(call[2]))
    out = extractor(images(RGB))
    origin = nn.functional.avg_pool2d(maps[0], 4).flatten(1)
    torch.testing.assert_close(out, origin)


@pytest.mark.parametrize("name", ["slim", "resnet18", "resnet20"])
def test_initialisation(name):
    for module in build(OWN[name]).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            n = module.weight.numel()
            # The variance of a sample variance is 2 / n of the variance squared: 5 deviations.
            ratio = module.weight.var().item() / (2 / fan_out)
            assert abs(ratio - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("name", [*OWN, "timm"])
def test_same_seed_same_start(name):
    backbone = tiny_vit() if name == "timm" else OWN[name]
    first, again, other = (build(backbone, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("name", ["mlp", "slim", "resnet20"])
def test_weights_round_trip(name, suffix, tmp_path):
    origin, file = build(OWN[name], seed=1), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        saved(origin, file)
    else:
        torch.save({"state_dict": origin.state_dict(), "epoch": 3}, file)
    loaded = build(dataclasses.replace(OWN[name], weights=str(file)))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in origin.state_dict().items())


def test_a_whole_classifier_gives_its_features(tmp_path):
    origin = classifier_of(MLP(hidden=(5,)), RGB, 3)
    wrapped = {f"module.{key}": value for key, value in origin.state_dict().items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    loaded = build(MLP(hidden=(5,), weights=str(tmp_path / "w.safetensors")))
    x = images(RGB)
    torch.testing.assert_close(loaded(x), origin.features(x), rtol=0, atol=0)


def test_batch_counts_may_be_absent_but_nothing_else(tmp_path):
    state = build(OWN["slim"], seed=1).state_dict()
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    assert len(old) < len(state)
    save_file(old, tmp_path / "old.safetensors")
    build(SlimResNet18(width=4, weights=str(tmp_path / "old.safetensors")))
    del old["bn1.running_var"]
    save_file(old, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"missing: bn1\.running_var\. Choose"):
        build(SlimResNet18(width=4, weights=str(tmp_path / "less.safetensors")))


def test_wrong_keys_are_named(tmp_path):
    state = build(OWN["slim"]).state_dict()
    state["bn1.gain"] = state.pop("bn1.weight")
    state["bn1.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        build(SlimResNet18(width=4, weights=str(tmp_path / "w.safetensors")))
    assert str(error.value) == (
        f"{tmp_path / 'w.safetensors'} doesn't fit ResNet; missing: bn1.weight; "
        "unexpected: bn1.gain; of another shape: bn1.bias [7] instead of [4]. "
        "Choose the backbone, its options and the head that the file was saved with."
    )


def test_many_wrong_keys_are_counted(tmp_path):
    file = saved(build(OWN["mlp"]), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"missing: conv1\.weight, .* and \d+ more; unexpected: l"):
        build(CifarResNet(weights=file))


class Payload:
    def __reduce__(self):
        return print, ("unpickled code ran",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, r"there is no file .*absent\.pt"),
        ("text.pt", b"hello", "can't be read"),
        ("empty.pth", b"", "can't be read"),
        ("text.safetensors", b"hello", "can't be read"),
        ("code.pt", {"w": Payload()}, "can't be read"),
        ("list.pt", [1, 2], "more than tensors"),
        ("mixed.pt", {"w": torch.zeros(1), "epoch": 3}, "more than tensors"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        build(MLP(weights=str(tmp_path / name)))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "model.onnx"}, "ends in .safetensors"),
        ({"load_head": True}, "set backbone.weights"),
        ({"mean": (0.5,)}, "give both or neither"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one value per channel"),
        ({"mean": (0.5,), "std": (0.0,)}, "above zero"),
        ({"hidden": ()}, "backbone.hidden"),
        ({"hidden": (3, 0)}, "backbone.hidden"),
    ],
)
def test_contradictory_options(options, message):
    with pytest.raises(UserError, match=message):
        MLP(**options)


def test_normalisation_of_another_number_of_channels():
    backbone = MLP(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    with pytest.raises(UserError, match=r"1 channels.*3 values"):
        build(backbone, (1, 28, 28))


YAMLS = sorted((ROOT / "conf" / "backbone").glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_lists_every_field(path):
    # Interpolations are another file's defaults: the cache folder, the device.
    tree = {"cache_dir": None, "device": "auto", "node": OmegaConf.load(path)}
    node = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)["node"]
    target = node["_target_"]
    kind = target_class(node, Backbone, "backbone")
    options = {name: value for name, value in node.items() if name != "_target_"}
    assert set(options) == {field.name for field in dataclasses.fields(kind)}
    shared = [other for other in YAMLS if OmegaConf.load(other)._target_ == target]
    if len(shared) == 1 or path.stem == kind.__name__.lower():
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                written = options[field.name]
                assert field.default == (tuple(written) if type(written) is list else written)
    assert build_node({"_target_": target, **options}, Backbone, "backbone")
    assert all("  # " in line for line in path.read_text().splitlines())


def test_residual_networks_are_as_deep_as_they_are_called():
    for depth in (20, 32, 56):
        assert OmegaConf.load(ROOT / "conf" / "backbone" / f"resnet{depth}.yaml").depth == depth


def test_describe(tmp_path):
    file = saved(build(OWN["slim"]), tmp_path / "slim.safetensors")
    backbone = SlimResNet18(width=4, weights=file, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    extractor = build(backbone)
    assert describe(backbone, extractor) == {
        "name": "SlimResNet18",
        "parameters": size(extractor),
        "n_features": 32,
        "weights": {
            "file": "slim.safetensors",
            "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        },
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 1.0, 1.0],
        "resized_to": None,
        "norm_layers": ["BatchNorm2d"],
    }


def test_describe_without_weights():
    facts = describe(MLP(), build(MLP()))
    assert (facts["weights"], facts["mean"], facts["norm_layers"]) == (None, None, [])


def test_timm_small_vit():
    extractor = build(tiny_vit())
    assert extractor.n_features == 192
    # 8 x 8 patches of 4 pixels and the class token.
    assert extractor.model.pos_embed.shape == (1, 65, 192)
    assert extractor.training
    assert all(module.training for module in extractor.modules())
    assert extractor(images(RGB)).shape == (2, 192)
    facts = describe(tiny_vit(), extractor)
    assert facts["name"] == "timm/vit_tiny_patch16_224"
    assert facts["norm_layers"] == ["LayerNorm"]
    assert (facts["weights"], facts["mean"]) == (None, None)


def test_timm_convolutional_network_in_grey():
    extractor = build(Timm(name="mobilenetv3_small_050", drop_rate=0.1), (1, 40, 48)).eval()
    assert extractor.model.drop_rate == 0.1
    assert extractor(images((1, 40, 48))).shape == (2, extractor.n_features)


def test_timm_weights_round_trip_and_normalisation(tmp_path):
    origin = build(tiny_vit(), seed=1)
    backbone = tiny_vit(weights=saved(origin, tmp_path / "w.safetensors"))
    loaded = build(backbone)
    x = images(RGB)
    torch.testing.assert_close(loaded(x), origin(x), rtol=0, atol=0)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert "state_dict" not in loaded.model.pretrained_cfg
    facts = describe(backbone, loaded)
    assert facts["weights"]["file"] == "w.safetensors"
    assert facts["mean"] == [0.5, 0.5, 0.5]
    own = tiny_vit(weights=backbone.weights, mean=(0.1, 0.1, 0.1), std=(1.0, 1.0, 1.0))
    assert own.mean == (0.1, 0.1, 0.1)


def test_timm_reads_its_own_files_with_a_classifier(tmp_path):
    import timm

    with torch.random.fork_rng():
        origin = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=4, num_classes=7)
    file = saved(origin, tmp_path / "w.safetensors")
    backbone = tiny_vit(weights=file, load_head=True)
    # The position embedding is resampled from 12 x 12 to 8 x 8 patches; the rest stays.
    with torch.random.fork_rng():
        extractor, head = backbone.build_with_head(RGB)
    assert extractor.model.pos_embed.shape == (1, 65, 192)
    assert torch.equal(extractor.model.norm.weight, origin.norm.weight)
    assert torch.equal(extractor.model.blocks[3].mlp.fc1.weight, origin.blocks[3].mlp.fc1.weight)
    assert torch.equal(head["weight"], origin.head.weight)
    assert torch.equal(head["bias"], origin.head.bias)


def test_timm_names_wrong_keys(tmp_path):
    state = build(tiny_vit()).state_dict()
    state["model.norm.gain"] = state.pop("model.norm.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight.*norm\.gain.*Choose the name"):
        build(tiny_vit(weights=str(tmp_path / "w.safetensors")))
    only_head = {"head.weight": torch.zeros(2, 192), "head.bias": torch.zeros(2)}
    save_file(only_head, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="a final layer only"):
        build(tiny_vit(weights=str(tmp_path / "head.safetensors")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "Did you mean .*vit_tiny_patch16_224"),
        ("vit_base_patch16_224_in21k", r"Did you mean vit_base_patch16_224\.augreg_in21k\?"),
        ("vit_tiny_patch16_224.in22k", r"timm knows vit_tiny_patch16_224\.augreg_in21k, "),
        ("qqqqqqqqqqqqqqq", r"no such model\. timm\.list_models\(\) lists all \d+"),
    ],
)
def test_timm_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        build(Timm(name=name))
    with pytest.raises(UserError, match=message):
        Timm(name=name, pretrained=True)


@pytest.mark.parametrize(
    ("backbone", "shape", "message"),
    [
        (Timm(name="vit_tiny_patch16_224"), (3, 8, 8), "can't read images"),
        (Timm(name="vit_tiny_patch16_224"), (3, 28, 28), "ignore what is left over"),
        (Timm(name="vit_tiny_patch16_224"), (3, 32, 40), "ignore what is left over"),
        (Timm(name="resnet18", patch_size=4), RGB, "couldn't build resnet18.*patch_size"),
    ],
)
def test_timm_impossible_images_and_options(backbone, shape, message):
    with pytest.raises(UserError, match=message):
        build(backbone, shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True, "weights": "w.pt"}, "give one of them"),
        ({"drop_rate": 1.0}, r"backbone\.drop_rate=1\.0"),
        ({"drop_path_rate": -0.1}, r"backbone\.drop_path_rate"),
    ],
)
def test_timm_contradictory_options(options, message):
    with pytest.raises(UserError, match=message):
        tiny_vit(**options)


def test_timm_without_a_hub_says_how_to_give_a_file(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"from the hub.*backbone\.weights=<file>"):
        build(Timm(name="vit_tiny_patch16_224", pretrained=True), (3, 224, 224))


def test_timm_hub_weights_keep_their_head(monkeypatch):
    """What the hub would send stands in for it: timm's own entry for weights at hand."""
    import timm

    create = timm.create_model
    with torch.random.fork_rng():
        origin = create("vit_tiny_patch16_224", img_size=32, patch_size=4)

    def from_memory(name, *, pretrained_cfg_overlay, **options):
        assert pretrained_cfg_overlay is None
        return create(name, pretrained_cfg_overlay={"state_dict": origin.state_dict()}, **options)

    monkeypatch.setattr(timm, "create_model", from_memory)
    backbone = tiny_vit(pretrained=True, load_head=True)
    with torch.random.fork_rng():
        model = classifier(backbone, RGB, 1000)
    x = images(RGB)
    torch.testing.assert_close(model.eval()(x), origin.eval()(x), rtol=0, atol=0)
    assert model.head_loaded
    facts = describe(backbone, model.features)
    assert facts["weights"]["tag"] == "augreg_in21k_ft_in1k"
    assert facts["weights"]["hub"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert facts["parameters"] == size(origin) - 193 * 1000


def test_timm_reads_images_in_the_size_of_the_weights():
    """As resizing them before: normalisation and cropping to a size commute with it."""
    backbone = Timm(name="vit_tiny_patch16_224", input_size="weights")
    extractor = build(backbone).eval()
    assert extractor.model.patch_embed.img_size == (224, 224)
    assert extractor.size == (224, 224)
    x = images(RGB)
    larger = nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    torch.testing.assert_close(extractor(x), extractor.model(larger), rtol=0, atol=0)
    torch.testing.assert_close(extractor(larger), extractor.model(larger), rtol=0, atol=0)
    assert describe(backbone, extractor)["resized_to"] == [224, 224]


def test_import_leaves_timm_alone():
    code = "import sys, clbench.nn.heads; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_resnet20_reaches_its_published_accuracy():
    """Measured beforehand on these JPEG images: 81.0 %, against 91.78 % on the originals."""
    weights, archive = DATA / "resnet20-cifar10.safetensors", DATA / "cifar10-images.tar.gz"
    if not weights.is_file() or not archive.is_file():
        pytest.skip(f"needs {weights.name} and {archive.name} in {DATA}")
    pixels, labels = jpeg_test_images(archive)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backbone = CifarResNet(weights=str(weights), load_head=True, mean=mean, std=std)
    with torch.random.fork_rng():
        model = classifier(backbone, RGB, 10).eval()
    assert model.head_loaded
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    right = 0
    with torch.inference_mode():
        for batch, target in zip(pixels.split(500), labels.split(500), strict=True):
            right += int((model((batch / 255 - shift) / scale).argmax(1) == target).sum())
    assert len(labels) == 10_000
    assert abs(100 * right / len(labels) - 81.0) <= 0.1


def jpeg_test_images(archive: Path) -> tuple[Tensor, Tensor]:
    """The archive's test part: uint8 [N, 3, 32, 32] and labels in alphabetical class order."""
    import numpy as np
    from PIL import Image

    by_class: dict[str, list[np.ndarray]] = {}
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if path.suffix == ".jpg" and path.parts[-3] == "test":
                content = files.extractfile(member)
                assert content is not None
                image = np.asarray(Image.open(io.BytesIO(content.read())))
                by_class.setdefault(path.parts[-2], []).append(image)
    stacks = [np.stack(by_class[name]) for name in sorted(by_class)]
    labels = np.repeat(np.arange(len(stacks)), [len(stack) for stack in stacks])
    pixels = torch.from_numpy(np.concatenate(stacks)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(labels)
