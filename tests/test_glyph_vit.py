"""The transformer that the suite pre-trains: what it learns, when, and what decides its weights."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from suite import Command
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import cache, glyph_datasets, glyph_vit, machine
from clbench.classification import Images
from clbench.errors import UserError
from clbench.glyph_catalogue import Pool
from clbench.glyph_vit import SHAPE, GlyphViT, Varied
from clbench.nn.backbones import ModelFeatures, describe
from clbench.nn.heads import Classifier
from clbench.nn.vit import vision_transformer
from clbench.samples import Samples, TensorSource

TINY: dict[str, Any] = {
    **{"n_classes": 4, "train_per_class": 40, "test_per_class": 20},
    **{"embed_dim": 16, "num_heads": 2, "depth": 1, "patch_size": 8, "epochs": 2},
    **{"batch_size": 16, "device": "cpu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue takes seconds to make, the images a moment: all tests share them."""
    return tmp_path_factory.mktemp("glyph_vit")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load of the machine may not decide the bits."""
    monkeypatch.setattr(machine, "idle_cores", lambda: 1)


def tiny(folder: Path, **options: Any) -> GlyphViT:
    return GlyphViT(**{**TINY, "cache_dir": folder, **options})


def pool(recipe: GlyphViT) -> Images:
    """What a recipe trains on."""
    available = glyph_datasets.known(recipe.cache_dir)
    characters = glyph_datasets.chosen(available, Pool.PRETRAINING, recipe.n_classes)
    counts = recipe.train_per_class, recipe.test_per_class
    drawn_by = available.faces_of(characters)
    return glyph_datasets.made(characters, drawn_by, counts, SHAPE[1], recipe.cache_dir)


def noise(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.glob("vit_glyphs-*")}


def quarters(n: int, seed: int) -> TensorSource:
    """Four classes: which quarter of an image full of noise is the brightest."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randint(100, (n, *SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 4
    for image, label in zip(noisy, labels.tolist(), strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 100
    return TensorSource(noisy, labels)


def test_it_learns(folder: Path) -> None:
    """200 answers, one in four right by chance: five standard deviations above is 0.40."""
    images = Images(quarters(160, 0), quarters(200, 1), "abcd", [0.5] * 3, [0.25] * 3)
    seen: list[tuple[int, int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = tiny(folder, epochs=8, learning_rate=1e-2, muon_learning_rate=1e-2)
        _, accuracy = glyph_vit.pretrain(
            recipe, images, torch.device("cpu"), lambda *a: seen.append(a)
        )
    assert accuracy > 0.40
    assert len(seen) == 8 * 10
    assert seen[0] == (16, 8 * 160)
    assert seen[-1] == (8 * 160, 8 * 160)


def test_made_once_then_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny(folder).build(SHAPE)

    def refuse(*_: Any) -> Any:
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(glyph_vit, "pretrain", refuse)
    again = tiny(folder).build(SHAPE)
    assert torch.equal(first.eval()(noise(3)), again.eval()(noise(3)))
    with pytest.raises(AssertionError, match="again"):
        tiny(folder, seed=5).build(SHAPE)


def test_the_cache_gives_back_what_was_trained(folder: Path, one_thread: None) -> None:  # noqa: ARG001
    recipe = tiny(folder, seed=2)
    built = recipe.build(SHAPE)
    with machine.isolated_rng(2, "vit_glyphs"), machine.thread_count(1):
        trained, accuracy = glyph_vit.pretrain(
            recipe, pool(recipe), torch.device("cpu"), lambda *_: None
        )
    ours = dict(vision_transformer(built).named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in trained.named_parameters())
    published = recipe.published()
    assert published
    assert published["held_out_accuracy"] == accuracy


def test_the_features_are_the_normalised_class_token(folder: Path) -> None:
    extractor = tiny(folder).build(SHAPE).eval()
    vit = vision_transformer(extractor)
    tokens = vit.forward_features(noise(2))
    assert tokens.shape == (2, 1 + 16, 16)
    assert torch.equal(extractor(noise(2)), tokens[:, 0])
    assert isinstance(extractor, ModelFeatures)
    assert extractor.n_features == 16
    assert vit.patch_drop.__class__ is nn.Identity
    assert tiny(folder).is_vision_transformer


def test_same_options_same_bits_wherever_the_cache_lies(
    folder: Path,
    tmp_path: Path,
    one_thread: None,  # noqa: ARG001
) -> None:
    catalogue = next(folder.glob("glyph_catalogue-*"))
    (tmp_path / catalogue.name).symlink_to(catalogue)
    first, elsewhere = tiny(folder).published(), tiny(tmp_path).published()
    other = tiny(folder, seed=3).published()
    assert first
    assert elsewhere
    assert other
    assert first["sha256"] == elsewhere["sha256"] != other["sha256"]


def test_making_it_leaves_the_process_as_it_was(folder: Path) -> None:
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(legacy=False)
    draws = []
    for recipe in (tiny(folder, seed=11), tiny(folder, seed=11)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            recipe.build(SHAPE)
            draws.append(torch.rand(3))
    assert torch.equal(*draws), "a head's initial weights must not depend on the cache"
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[1])
    assert torch.get_num_threads() == threads


def test_an_interrupted_pretraining_leaves_nothing_and_can_be_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entries(folder)
    train: Any = glyph_vit.pretrain

    def interrupted(*args: Any) -> Any:
        def tell(done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

        return train(*args[:-1], tell)

    with monkeypatch.context() as patched:
        patched.setattr(glyph_vit, "pretrain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny(folder, seed=21).build(SHAPE)
    assert entries(folder) == before
    tiny(folder, seed=21).build(SHAPE)
    assert len(entries(folder) - before) == 1


CHANGED: dict[str, Any] = {
    **{"mean": (0.4, 0.5, 0.5), "std": (0.4, 0.5, 0.5), "patch_size": 16, "embed_dim": 8},
    **{"depth": 2, "num_heads": 1, "n_classes": 3, "train_per_class": 41, "test_per_class": 21},
    **{"epochs": 3, "batch_size": 17, "learning_rate": 1e-4, "muon_learning_rate": 1e-4},
    **{"weight_decay": 0.1, "warmup": 0.2, "hidden_patches": 0.1, "whole": 0.3, "shift": 1.0},
    **{"scale": 0.2, "contrast": 0.3, "recolour": False, "seed": 1},
}


def test_every_option_that_decides_the_weights_is_in_the_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def remember(_: Any, __: str, key: dict[str, Any], *___: Any, **____: Any) -> Any:
        found.append(json.dumps(key, sort_keys=True))

    recipe = tiny(folder)
    available = glyph_datasets.known(folder)
    monkeypatch.setattr(glyph_datasets, "known", lambda _: available)
    monkeypatch.setattr(cache, "arrays", remember)
    for name, value in CHANGED.items():
        replace(recipe, **{name: value})._pretrained()
    recipe._pretrained()
    assert len(set(found)) == len(CHANGED) + 1
    replace(recipe, device="auto")._pretrained()
    replace(recipe, weights="elsewhere.pt")._pretrained()
    monkeypatch.setattr(glyph_vit, "_VERSION", 0)
    recipe._pretrained()
    monkeypatch.setattr(glyph_datasets, "fingerprint", lambda: {"fonts": "others"})
    recipe._pretrained()
    assert found[-4] == found[-5] == found[len(CHANGED)]
    assert len(set(found)) == len(CHANGED) + 3
    options = {f.name for f in fields(GlyphViT)} - {"weights", "load_head", "cache_dir", "device"}
    assert options == set(CHANGED)


def test_results_say_what_the_weights_are(folder: Path) -> None:
    backbone = tiny(folder)
    extractor = backbone.build(SHAPE)
    told = describe(backbone, extractor)
    flat = torch.cat([p.detach().flatten() for p in extractor.parameters()])
    assert told["weights"]["sha256"] == hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    assert 0 <= told["weights"]["held_out_accuracy"] <= 1
    assert told["weights"]["images"] == 160
    assert told["weights"]["environment"]["torch"] == machine.version("torch")
    assert told["mean"] == told["std"] == [0.5, 0.5, 0.5]
    json.dumps(told, allow_nan=False)


def test_weights_from_a_file_need_no_pretraining(folder: Path, tmp_path: Path) -> None:
    built = tiny(folder).build(SHAPE)
    before = entries(folder)
    final = nn.Linear(16, 4)
    whole = Classifier(built, final)
    for name, module in (("features", built), ("vit", vision_transformer(built)), ("all", whole)):
        file = tmp_path / f"{name}.safetensors"
        save_file(module.state_dict(), file)
        backbone = tiny(folder, weights=str(file), seed=99)
        again = backbone.build(SHAPE)
        assert torch.equal(built.eval()(noise(2)), again.eval()(noise(2)))
        assert describe(backbone, again)["weights"]["file"] == file.name
    assert entries(folder) == before
    head = tiny(folder, weights=str(file), load_head=True).build_with_head(SHAPE)[1]
    assert torch.equal(head["weight"], final.weight)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 32, 32), (3, 28, 28), (3, 64, 64)])
def test_other_images_are_refused_before_any_training(tmp_path: Path, shape: Any) -> None:
    with pytest.raises(UserError, match=r"3x32x32.*scenario=glyphs"):
        tiny(tmp_path).build(shape)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_head": True}, r"load_head=true"),
        ({"patch_size": 5}, r"patch_size=5 does not divide 32"),
        ({"num_heads": 3}, r"num_heads=3 does not divide embed_dim \(16\)"),
        ({"embed_dim": 18}, r"embed_dim=18: give a multiple of 4"),
        ({"mean": None, "std": None}, r"needs mean and std"),
        ({"mean": (0.5,), "std": (0.5,)}, r"needs mean and std of 3"),
        ({"hidden_patches": 1.0}, r"hidden_patches=1\.0 is out of range"),
        ({"warmup": 1.0}, r"warmup=1\.0 is out of range"),
        ({"epochs": 0}, r"epochs=0 is out of range"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 is out of range"),
        ({"n_classes": -1}, r"n_classes=-1 is out of range"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(tmp_path, **options)


def test_learning_rate_by_hand() -> None:
    rates = [glyph_vit._schedule(done, 0.2) for done in (0.05, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 0.5, 0.0])
    assert glyph_vit._schedule(0.5, 0.0) == pytest.approx(0.5)


def test_every_parameter_has_one_optimizer(folder: Path) -> None:
    recipe = tiny(folder, depth=3, weight_decay=0.1)
    with torch.random.fork_rng():
        body, head = recipe.transformer(), nn.Linear(16, 4)
    adamw, muon = glyph_vit._optimizers(recipe, body, head)
    assert [len(group["params"]) for group in muon.param_groups] == [4 * 3]
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    owned = [p for o in (adamw, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, (*body.parameters(), *head.parameters())))
    free = {id(p) for g in adamw.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    bare = {name for name, p in body.named_parameters() if id(p) in free}
    expected = {n for n, _ in body.named_parameters() if n.endswith("bias") or "norm" in n}
    assert bare == expected | {"cls_token", "pos_embed"}


class Counting(GlyphViT):
    """Remembers how many tokens the first block gets in each step of training."""

    def transformer(self, hidden_patches: float = 0.0) -> Any:
        self.tokens: list[int] = []
        vit = super().transformer(hidden_patches)

        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if vit.training:
                self.tokens.append(inputs[0].shape[1])

        vit.blocks[0].register_forward_pre_hook(count)
        return vit


def test_patches_are_hidden_until_the_last_part_of_the_training(folder: Path) -> None:
    """2 epochs of 10 steps; 16 patches and the class token."""
    recipe = Counting(**{**TINY, "cache_dir": folder, "hidden_patches": 0.75, "whole": 0.25})
    with torch.random.fork_rng():
        glyph_vit.pretrain(recipe, pool(recipe), torch.device("cpu"), lambda *_: None)
    assert recipe.tokens == [1 + 4] * 15 + [1 + 16] * 5


def images(n: int = 64) -> Tensor:
    """A bright square on a dark ground, off the centre."""
    made = torch.full((n, *SHAPE), 60, dtype=torch.uint8)
    made[:, :, 10:14, 18:22] = 180
    return made


def transform(**options: Any) -> Varied:
    nothing = {"shift": 0.0, "scale": 0.0, "contrast": 0.0, "recolour": False}
    return Varied((0.5,) * 3, (0.5,) * 3, **{**nothing, **options})


def varied(raw: Tensor, **options: Any) -> Tensor:
    return transform(**options).augment(raw, torch.Generator().manual_seed(0))


def centre(made: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass above the ground, in pixels from the middle of the image."""
    mass = (made - 60).clamp_min(0).mean(1)
    line = torch.arange(32) - 15.5
    return (mass.sum(1) @ line) / mass.sum((1, 2)), (mass.sum(2) @ line) / mass.sum((1, 2))


def test_no_variation_gives_the_image_itself() -> None:
    torch.testing.assert_close(varied(images()), images().float(), rtol=0, atol=0.02)
    expected = (images().float() / 255 - 0.5) / 0.5
    trained = transform().train(images(), torch.Generator())
    torch.testing.assert_close(trained, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(transform(shift=9.0, recolour=True).test(images()), expected)


def test_shift_moves_each_image_by_its_own_distance_up_to_the_largest() -> None:
    """The square's middle lies 4 pixels right of the image's and 4 above it."""
    x, y = centre(varied(images(), shift=3.0))
    for moved in (x - 4, y + 4):
        assert moved.abs().max() <= 3.01
        assert moved.min() < -2
        assert moved.max() > 2
        assert len(moved.unique()) > 32
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.5, "both ways move as one"


def test_scale_resizes_about_the_middle() -> None:
    """The grid to sample grows by at most a quarter: distances shrink to 4/5 or grow to 4/3."""
    x, y = centre(varied(images(), scale=0.25))
    torch.testing.assert_close(x, -y, rtol=0, atol=0.05)
    assert x.min() > 4 / 1.25 - 0.05
    assert x.max() < 4 / 0.75 + 0.05
    assert x.max() - x.min() > 1


def test_contrast_and_brightness_stay_within_their_bounds() -> None:
    made = varied(images(), contrast=0.2)
    low, high = made[:, :, 0, 0], made[:, :, 12, 20]
    contrast = (high - low) / 120
    torch.testing.assert_close(contrast, contrast[:, :1].expand(-1, 3), rtol=0, atol=1e-4)
    assert contrast.min() > 0.8 - 1e-4
    assert contrast.max() < 1.2 + 1e-4
    assert contrast.max() - contrast.min() > 0.2
    shift = low - (127.5 + contrast * (60 - 127.5))
    assert shift.abs().max() <= 0.2 * 127.5 + 1e-3
    assert (shift[:, 0] - shift[:, 1]).abs().max() > 5, "each channel has a brightness of its own"


def test_recolouring_swaps_whole_channels_and_turns_whole_images() -> None:
    """Channels of grey 10, 60 and 180; of a negative 245, 195 and 75: 12 images, all possible."""
    raw = torch.tensor([10, 60, 180], dtype=torch.uint8).view(1, 3, 1, 1).expand(600, 3, 32, 32)
    made = varied(raw, recolour=True)
    torch.testing.assert_close(made, made[:, :, :1, :1].expand_as(made), rtol=0, atol=1e-2)
    kinds, counts = made[:, :, 0, 0].round().int().unique(dim=0, return_counts=True)
    triples = {tuple(sorted(kind)) for kind in kinds.tolist()}
    assert triples == {(10, 60, 180), (75, 195, 245)}
    assert len(kinds) == 12
    # 50 are expected of each: five standard deviations of a binomial are 34.
    assert (counts - 50).abs().max() < 34


def test_accuracy_by_hand() -> None:
    class Answers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(x[:, 0, 0, 0].long(), 3)

    inputs = torch.tensor([0, 1, 2, 2]).view(4, 1, 1, 1).to(torch.uint8)
    source = TensorSource(inputs, torch.tensor([0, 1, 1, 2]))
    scale = (1 / 255,)  # raw numbers come through
    samples = Samples(source, torch.arange(4), Varied((0.0,), scale, 0, 0, 0, False))
    assert glyph_vit._accuracy(Answers(), samples) == 0.75


def test_the_command_line_pretrains_it_and_says_so(command: Command, folder: Path) -> None:
    options = [f"backbone.{key}={value}" for key, value in TINY.items() if key != "device"]
    small = ["n_classes=4", "n_experiences=2", "train_per_class=20", "test_per_class=5"]
    done = command(
        *("scenario=glyphs", "strategy=simple_cil", "backbone=vit_glyphs", "device=cpu"),
        *(f"cache_dir={folder}", "progress=false", *options),
        *(f"scenario.{option}" for option in small),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((Path(done.stdout.splitlines()[-1]) / "result.json").read_text())
    told = written["scenario_facts"]["backbone"]
    assert told["name"] == "GlyphViT"
    assert told["weights"]["sha256"] == (tiny(folder).published() or {})["sha256"]
    assert written["run"]["options"]["strategy"]["_target_"] == "strategies.nmc.NMC"
    assert written["run"]["options"]["strategy"]["metric"] == "cosine"
    refused = command("scenario=digits", "strategy=nmc", "backbone=vit_glyphs", *options)
    assert refused.returncode == 2
    assert "1x8x8" in refused.stderr
