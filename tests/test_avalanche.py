"""Avalanche's benchmarks, strategies and plug-ins in the suite, and our scenarios in Avalanche."""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche_agreement import PAIRS, Agreement, corrected, measured, table
from suite import composed, write_all
from torch import Tensor

from clbench import UserError, run, userspace
from clbench.avalanche import to_avalanche
from clbench.conditions import Conditions
from clbench.config import build
from clbench.nn.backbones import MLP
from clbench.one_by_one import Stored, Views
from clbench.progress import Silent
from clbench.protocol import run as run_here
from clbench.results import RunFolder
from clbench.samples import Samples
from clbench.testing import ToyScenario, check_scenario
from clbench.types import Scenario, Split, Strategy
from scenarios.avalanche import Benchmark, DomainBenchmark
from strategies.avalanche import Avalanche
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.lwf import LwF

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TOY = ToyScenario()
#: A whole experience in a batch: the order within it is all that a side draws, and is no matter.
WHOLE = ToyScenario(batch_size=80, epochs=6, memory_size=0)


def weights(strategy: Strategy) -> list[Tensor]:
    return [p.detach() for p in vars(strategy)["model"].parameters()]


# Strategies: the same equations give the same weights.

EQUAL: dict[str, tuple[Strategy, Strategy]] = {
    "finetune": (Avalanche(name="Naive"), Finetune()),
    "momentum": (
        Avalanche(name="Naive", momentum=0.9, weight_decay=0.01),
        Finetune(momentum=0.9, weight_decay=0.01),
    ),
    "ewc": (
        Avalanche(name="EWC", arguments={"ewc_lambda": 20.0}),
        EWC(ewc_lambda=40.0, fisher="batch"),
    ),
    "ewc online": (
        Avalanche(name="EWC", arguments={"ewc_lambda": 9.0, "mode": "online", "decay_factor": 0.5}),
        EWC(ewc_lambda=18.0, fisher="batch", form="online", gamma=0.5),
    ),
    "lwf": (
        Avalanche(name="LwF", arguments={"alpha": 3.0, "temperature": 2.0}),
        LwF(lwf_lambda=3.0, temperature=2.0, cross_entropy_over="all"),
    ),
    "ewc as a plug-in": (
        Avalanche(plugins={"EWCPlugin": {"ewc_lambda": 20.0}}),
        EWC(ewc_lambda=40.0, fisher="batch"),
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), EQUAL.values(), ids=EQUAL.keys())
def test_the_same_equation_gives_the_same_weights(theirs: Strategy, ours: Strategy) -> None:
    """Of one experience after another, as only the first has no state of an optimizer before."""
    count = 1 if vars(ours)["momentum"] else 3
    scenario = replace(WHOLE, n_experiences=count, batch_size=240 // count)
    for strategy in (theirs, ours):
        assert run(scenario, strategy, threads=1).status == "complete"
    for a, b in zip(weights(theirs), weights(ours), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_methods_change_something() -> None:
    """Else their agreement would say nothing."""
    plain = Finetune()
    run(WHOLE, plain, threads=1)
    for name in ("ewc", "ewc online", "lwf"):
        method = EQUAL[name][1]
        run(WHOLE, method, threads=1)
        pairs = zip(weights(method), weights(plain), strict=True)
        assert max(float((a - b).abs().max()) for a, b in pairs) > 0.01


@pytest.mark.slow
def test_both_agree_within_seed_noise() -> None:
    """Over five seeds, for every metric, where both define the same; docs/avalanche.md."""
    found = {name: measured(pair) for name, pair in PAIRS.items()}
    print(table(found))  # noqa: T201
    assert min(corrected(found).values()) > 0.05
    (other,) = (name for name, pair in PAIRS.items() if not pair.same)
    assert found[other]["average accuracy"].p_value < 0.05, "the docs say that they differ"


def test_a_difference_would_be_noticed() -> None:
    """A method that is 2 % better on every seed does not agree."""
    base = [0.90, 0.91, 0.92, 0.93, 0.94]
    noise = [0.001, -0.001, 0.002, -0.002, 0.0]
    other = Agreement(base, [b + 0.02 + n for b, n in zip(base, noise, strict=True)])
    same = Agreement(base, [b + n for b, n in zip(base, noise, strict=True)])
    (name, *_) = PAIRS
    found = corrected({name: {"better": other, **{f"same {i}": same for i in range(19)}}})
    assert found[name, "better"] < 0.05
    assert found[name, "same 0"] > 0.05


# Strategies: the budget is the scenario's.


def test_what_the_scenario_decides_is_handed_over() -> None:
    scenario = replace(TOY, memory_size=24, memory_batch_size=6)
    strategy = Avalanche(name="MIR", arguments={"subsample": 12})
    found = run(scenario, strategy, threads=1)
    learner = strategy._learner
    assert (learner.train_mb_size, learner.train_epochs) == (10, 5)
    assert found.costs["memory_samples"] == 24
    assert found.costs["train_samples"] == 3 * 80 * 5
    (plugin,) = (p for p in learner.plugins if type(p).__name__ == "MIRPlugin")
    assert (plugin.mem_size, plugin.batch_size_mem, plugin.subsample) == (24, 6, 12)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Replay", {}), ("DER", {}), ("ER_ACE", {}), ("MER", {"n_inner_steps": 1})],
)
def test_only_samples_of_the_stream_count_as_steps(name: str, arguments: dict[str, Any]) -> None:
    found = run(TOY, Avalanche(name=name, arguments=arguments), threads=1)
    assert found.costs["train_samples"] == 3 * 80 * 5
    assert found.costs["memory_samples"] == 30
    assert found.costs["forward_samples"] > found.costs["train_samples"]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["AGEM", "GEM"])
def test_a_memory_that_outgrows_the_budget_is_an_error(name: str) -> None:
    if name == "GEM":
        pytest.importorskip("quadprog")
    within = Avalanche(name=name, arguments={"patterns_per_exp": 10})
    assert run(TOY, within, threads=1).costs["memory_samples"] == 30
    beyond = Avalanche(name=name, arguments={"patterns_per_exp": 11})
    with pytest.raises(UserError, match=f"{name} keeps 33 samples after 3 experiences"):
        run(TOY, beyond, threads=1)


def test_looking_while_it_learns_changes_nothing() -> None:
    plain, often = (Avalanche(name="DER") for _ in range(2))
    one = run(TOY, plain, threads=1)
    other = run(TOY, often, threads=1, evaluate_every=3)
    assert one.accuracy_matrix == other.accuracy_matrix
    assert len(other.evaluations) == 3 * 40 // 3
    for a, b in zip(weights(plain), weights(often), strict=True):
        assert torch.equal(a, b)


def test_nothing_of_the_future_is_told() -> None:
    told: list[Any] = []

    class Listening(Avalanche):
        """Notes what Avalanche is told of an experience."""

        def _told(self, dataset: Any, experience: Any) -> Any:
            told.append(super()._told(dataset, experience))
            return told[-1]

    run(TOY, Listening(name="Naive"), threads=1)
    for index, one in enumerate(told):
        mine = {2 * index, 2 * index + 1}
        assert one.classes_in_this_experience == mine
        assert one.previous_classes == {*range(2 * index)}
        assert one.classes_seen_so_far == {*range(2 * index + 2)}
        assert one.current_experience == index
        assert len(one.origin_stream) == 1
        assert set(one.dataset.targets) == mine


class Stop(Silent):
    """Interrupts when the second experience begins."""

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        if name.startswith("experience 2"):
            raise KeyboardInterrupt


def test_an_interrupted_run_begins_anew_and_ends_the_same(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    conditions = Conditions(device="cpu", threads=1)
    with pytest.raises(KeyboardInterrupt):
        run_here(TOY, Avalanche(name="Replay"), conditions, folder=folder, progress=Stop())
    assert not folder.checkpoint.exists()
    rest = run_here(TOY, Avalanche(name="Replay"), conditions, folder=folder)
    log = (folder.path / "log.txt").read_text()
    assert "can't be saved: if interrupted, the run begins anew" in log
    assert "resumed" not in log
    whole = run(TOY, Avalanche(name="Replay"), threads=1)
    assert rest.accuracy_matrix == whole.accuracy_matrix
    assert rest.costs["train_samples"] == whole.costs["train_samples"]


def test_its_words_stay_out_of_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    run(TOY, Avalanche(name="ER_ACE"), threads=1)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


# Strategies: what is refused, before anything is learned.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"name": "Naiv"}, "has no Naiv. Did you mean 'Naive'"),
    "task labels": ({"name": "PNNStrategy"}, "it needs task labels"),
    "all data": ({"name": "JointTraining"}, "it needs the data of all experiences"),
    "own model": ({"name": "AR1"}, "it needs a model of its own"),
    "future": ({"name": "ICaRL"}, "the classes to come included"),
    "lacks": ({"name": "EWC"}, "EWC needs ewc_lambda"),
    "argument": ({"name": "EWC", "arguments": {"lambda": 1}}, "lambda is no argument of EWC"),
    "budget": ({"name": "Naive", "arguments": {"train_epochs": 9}}, "is given by the run"),
    "plug-in": ({"plugins": {"EWC": {}}}, "strategy.plugins: .* has no EWC. Did you mean 'EWCPl"),
    "of the plug-in": ({"plugins": {"EWCPlugin": {}}}, "EWCPlugin needs ewc_lambda"),
    "no strategy": ({"name": "avalanche.training.storage_policy.ReservoirSamplingBuffer"}, "is no"),
    "elsewhere": ({"name": "os.system"}, "is refused: give a name from avalanche.training"),
    "private": ({"name": "avalanche.training.supervised._x.Naive"}, "is refused"),
    "imported there": ({"name": "avalanche.training.supervised.der.torch"}, "has no torch"),
    "another's class": (
        {"name": "avalanche.training.supervised.der.AvalancheDataset"},
        "has no AvalancheDataset",
    ),
    "other part of Avalanche": ({"name": "avalanche.models.SimpleMLP"}, "is refused"),
    "no module": ({"name": "avalanche.training.nothing.Naive"}, "there is no module"),
    "path": ({"name": "avalanche.training/../os.system"}, "is refused"),
    "engine": ({"name": "clbench.machine._git"}, "is refused"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_t_work_is_refused_with_the_reason(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Avalanche(**options).check(TOY)


def test_what_the_stream_does_not_offer_is_refused() -> None:
    with pytest.raises(UserError, match=r"scenario\.memory_size=0 allows none"):
        Avalanche(name="Replay").check(replace(TOY, memory_size=0))
    with pytest.raises(UserError, match="takes one step on each mini-batch"):
        Avalanche(name="Naive").check(replace(TOY, online=True, epochs=1, passes=3))
    with pytest.raises(UserError, match="has no mixed precision"):
        run(TOY, Avalanche(name="Naive"), precision="bf16")


def test_plain_values_from_the_command_line_reach_the_class() -> None:
    overrides = ("strategy=avalanche", "strategy.name=LwF")
    line = "+strategy.arguments={alpha: 2, temperature: 1.5}"
    strategy = build(composed(*overrides, line)["strategy"], Strategy, "strategy")
    assert vars(strategy)["arguments"] == {"alpha": 2, "temperature": 1.5}
    strategy.check(TOY)


OWN = """
from pathlib import Path
from avalanche.training.plugins import EWCPlugin
from avalanche.training.supervised import Naive
from shutil import copyfile

class Mine(EWCPlugin):
    pass

class Whole(Naive):
    pass

def helper(path):
    Path(path).touch()
"""


@pytest.mark.usefixtures("fresh")
def test_the_user_s_own_classes_are_found_and_nothing_else_is_called(work: Path) -> None:
    write_all(work, {"strategies/own_peer.py": OWN, "own_peer.py": "raise SystemExit"})
    userspace.join(work)
    mine = Avalanche(
        name="strategies.own_peer.Whole", plugins={"strategies.own_peer.Mine": {"ewc_lambda": 1.0}}
    )
    assert run(TOY, mine, threads=1).status == "complete"
    for name in ("helper", "copyfile", "Path", "EWCPlugin"):
        with pytest.raises(UserError):
            Avalanche(
                name=f"strategies.own_peer.{name}", arguments={"path": str(work / "canary")}
            ).check(TOY)
    with pytest.raises(UserError, match="is refused"):
        Avalanche(name="own_peer.Whole").check(TOY)
    assert not (work / "canary").exists()


# Our scenarios as benchmarks.


def inputs(samples: Samples) -> set[tuple[bytes, int]]:
    batch = samples.take(torch.arange(len(samples)))
    pairs = zip(batch.inputs, batch.targets.tolist(), strict=True)
    return {(x.numpy().tobytes(), y) for x, y in pairs}


def test_a_benchmark_of_ours_has_the_same_samples() -> None:
    stream, made = TOY.stream(Split.EVALUATE, 3), to_avalanche(TOY, Split.EVALUATE, 3)
    for index, experience in enumerate(stream.experiences):
        theirs = made.train_stream[index], made.test_stream[index]
        assert theirs[0].classes_in_this_experience == {*experience.classes}
        assert theirs[0].task_labels == [0]
        assert experience.train is not None
        for one, samples in zip(theirs, (experience.train, stream.tests[index]), strict=True):
            found = {(x.numpy().tobytes(), y) for x, y, _ in one.dataset}
            assert found == inputs(samples)
            assert len(one.dataset) == len(samples)


def test_its_training_samples_are_augmented_and_its_tests_are_not() -> None:
    made = to_avalanche(replace(TOY, flip=True, crop_padding=2))
    train, test = made.train_stream[0].dataset, made.test_stream[0].dataset
    assert any(not torch.equal(train[0][0], train[0][0]) for _ in range(20))
    assert torch.equal(train.eval()[0][0], train.eval()[0][0])
    assert torch.equal(test[0][0], test[0][0])


@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_avalanche_s_own_loop_trains_on_it() -> None:
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    made = to_avalanche(TOY)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 6))
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    naive = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        train_mb_size=10,
        train_epochs=3,
        eval_mb_size=100,
        evaluator=evaluator,
    )
    naive.train(made.train_stream[0])
    naive.eval(made.test_stream[:1])
    score = evaluator.get_last_metrics()["Top1_Acc_Stream/eval_phase/test_stream/Task000"]
    assert score == 1


def test_only_class_incremental_scenarios_are_given() -> None:
    domains = build(composed("scenario=rotated_digits")["scenario"], Scenario, "scenario")
    with pytest.raises(UserError, match="only class-incremental scenarios"):
        to_avalanche(domains)


# Their benchmarks as scenarios. The user's own factories make them of what there is.

FACTORIES = '''
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, ni_benchmark
from clbench.avalanche import to_avalanche as _to_avalanche
from clbench.testing import ToyScenario as _ToyScenario
from torchvision import transforms as T
from torchvision.transforms import functional as F
from PIL import Image


class _Pictures(torch.utils.data.Dataset):
    """Noisy patterns of 8x8 pixels, as PIL images of 3 channels."""

    def __init__(self, seed, count=30):
        generator = torch.Generator().manual_seed(0)
        patterns = 255 * torch.rand(6, 8, 8, 3, generator=generator)
        generator.manual_seed(seed)
        self.targets = torch.arange(6).repeat(count).tolist()
        noise = 30 * torch.randn(6 * count, 8, 8, 3, generator=generator)
        self.pixels = (patterns[self.targets] + noise).clamp(0, 255).byte().numpy()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return Image.fromarray(self.pixels[i]), self.targets[i]


_TEST = T.Compose([T.ToTensor(), T.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))])
_TRAIN = T.Compose([T.RandomHorizontalFlip(), _TEST])
_ROTATED = T.Compose([T.Lambda(lambda image: F.rotate(image, 90)), _TEST])
_ODD = T.Compose([T.ToTensor(), T.Lambda(lambda x: x ** 2)])


def toy(seed=0):
    return _to_avalanche(_ToyScenario(), seed=seed)


def pictures(n_experiences=3, seed=0, transforms="usual", task_id=False, zero=False, test=30):
    train, eval_ = {"usual": (_TRAIN, _TEST), "odd": (_ODD, _ODD)}[transforms]
    return nc_benchmark(
        _Pictures(1), _Pictures(2, test), n_experiences, task_id, seed=seed,
        train_transform=train, eval_transform=eval_, class_ids_from_zero_in_each_exp=zero,
    )


def instances(n_experiences=2, seed=0):
    return ni_benchmark(
        _Pictures(1), _Pictures(2), n_experiences, seed=seed,
        train_transform=_TEST, eval_transform=_TEST,
    )


def nothing():
    return 3


def broken():
    raise OSError("no such host")
'''


@pytest.fixture
def own(work: Path, fresh: None) -> Callable[..., Benchmark]:  # noqa: ARG001
    write_all(work, {"scenarios/own_streams.py": FACTORIES})
    userspace.join(work)

    def make(name: str, **options: Any) -> Benchmark:
        options = {"backbone": MLP(hidden=(16,)), **options}
        return Benchmark(benchmark=f"scenarios.own_streams.{name}", **options)

    return make


Own = Callable[..., Benchmark]


def test_there_and_back_again_the_samples_are_the_same(own: Own) -> None:
    scenario = own("toy", tuning_fraction=0.0, epochs=5, batch_size=10, memory_size=30)
    found, stream = scenario.stream(Split.EVALUATE, 3), TOY.stream(Split.EVALUATE, 3)
    for index, experience in enumerate(stream.experiences):
        theirs = found.experiences[index]
        assert theirs.classes == experience.classes
        assert theirs.train is not None
        assert experience.train is not None
        assert inputs(theirs.train) == inputs(experience.train)
        assert inputs(found.tests[index]) == inputs(stream.tests[index])


def test_a_benchmark_is_a_scenario_like_any_other(own: Own) -> None:
    for name in ("toy", "pictures"):
        check_scenario(own(name))
    found = run(own("pictures", epochs=5, batch_size=10), "replay", threads=1)
    assert found.status == "complete"
    assert found.metrics["average_accuracy"] > 0.8  # type: ignore[operator]
    assert found.scenario_facts["avalanche"]


def test_pixels_stay_pixels_where_that_is_the_same(own: Own) -> None:
    usual = own("pictures").stream(Split.EVALUATE, 0)
    assert usual.facts["stored"] == "pixels"
    assert usual.facts["training_transform"] == "left out"
    samples = usual.experiences[0].train
    assert samples is not None
    raw = samples.take(torch.arange(4)).raw
    assert raw.dtype == torch.uint8
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    expected = (raw / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert torch.allclose(samples.take(torch.arange(4)).inputs, expected, atol=1e-4)
    odd = own("pictures", arguments={"transforms": "odd"}).stream(Split.EVALUATE, 0)
    assert odd.facts["stored"] == "inputs"
    assert odd.facts["training_transform"] == "that of evaluation"
    one = odd.experiences[0].train
    assert one is not None
    batch = one.take(torch.arange(4))
    assert torch.equal(batch.inputs, batch.raw)
    assert batch.inputs.max() <= 1


def test_our_augmentation_takes_the_place_of_theirs(own: Own) -> None:
    stream = own("pictures", flip=True).stream(Split.EVALUATE, 0)
    samples = stream.experiences[0].train
    assert samples is not None
    everything = torch.arange(len(samples))
    plain = samples.take(everything).inputs
    shown = samples.take(everything, torch.Generator().manual_seed(0)).inputs
    mirrored = (shown == plain.flip(3)).flatten(1).all(1)
    assert 0.2 < mirrored.float().mean() < 0.8
    assert ((shown == plain).flatten(1).all(1) | mirrored).all()


def test_the_split_depends_on_content_and_on_no_order(own: Own) -> None:
    scenario = own("pictures", tuning_fraction=0.3)

    def rows(split: Split, seed: int) -> set[bytes]:
        stream = scenario.stream(split, seed)
        parts = [*(e.train for e in stream.experiences), *stream.tests]
        return {
            row.tobytes() for s in parts if s for row in s.take(torch.arange(len(s))).raw.numpy()
        }

    for split in Split:
        assert rows(split, 0) == rows(split, 1)
    assert not rows(Split.TUNE, 0) & rows(Split.EVALUATE, 1)
    tune = scenario.stream(Split.TUNE, 0)
    sizes = [len(e.train or ()) + len(t) for e, t in zip(tune.experiences, tune.tests, strict=True)]
    assert sizes == [2 * 9] * 3, "0.3 of the 30 samples of each of two classes"
    assert [len(t) for t in tune.tests] == [2 * 2] * 3


def test_samples_that_are_alike_are_in_one_split() -> None:
    """Twice the same data: whatever is tuned on, its double is no evaluation sample."""
    twice = [(torch.full((1, 2, 2), float(i % 10)), 0) for i in range(20)]
    views = Views(twice, twice, twice, [0] * 20)
    stored = Stored([views, views], 1)
    (learn,), (check,) = stored.divided(Split.TUNE, 0.4)
    (rest,), _ = stored.divided(Split.EVALUATE, 0.4)
    values = [set(stored.source.gather(part)[:, 0, 0, 0].tolist()) for part in (learn, check, rest)]
    assert not values[0] & values[1]
    assert not (values[0] | values[1]) & values[2]
    assert len(learn) + len(check) + len(rest) == 20


def test_domains_share_a_test_and_are_scored_from_the_beginning(own: Own) -> None:
    classes = own("instances")
    with pytest.raises(UserError, match="use scenario=avalanche_domains"):
        classes.stream(Split.EVALUATE, 0)
    scenario = DomainBenchmark(benchmark=classes.benchmark, backbone=MLP(hidden=(16,)))
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.tests[0] is stream.tests[1]
    assert [e.name for e in stream.experiences] == ["domain 1", "domain 2"]
    found = run(scenario, "finetune", threads=1)
    assert all(value is not None for row in found.accuracy_matrix for value in row)
    assert found.task_aware_accuracy_matrix == []
    run(scenario, "finetune", threads=1, split="tune")


def test_the_seed_decides_the_order_unless_the_arguments_do(own: Own) -> None:
    orders = {
        tuple(own("pictures").stream(Split.EVALUATE, s).facts["class_names"]) for s in range(4)
    }
    assert len(orders) > 1
    fixed = own("pictures", arguments={"seed": 3})
    orders = {tuple(fixed.stream(Split.EVALUATE, s).facts["class_names"]) for s in range(4)}
    assert len(orders) == 1


def test_global_generators_are_left_alone(own: Own) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    own("pictures").stream(Split.EVALUATE, 0)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_changed_factory_is_another_run(own: Own, work: Path) -> None:
    first = own("pictures").fingerprint()
    assert own("toy").fingerprint() == first, "one file"
    published = Benchmark(backbone=MLP(), arguments={"n_experiences": 5})
    assert published.fingerprint().keys() == {"avalanche-lib"}
    with (work / "scenarios" / "own_streams.py").open("a") as file:
        file.write("# another thought\n")
    assert own("pictures").fingerprint() != first


BAD_BENCHMARKS: Mapping[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"benchmark": "SplitMNST"}, "has no SplitMNST. Did you mean 'SplitMNIST'"),
    "argument": ({"arguments": {"experiences": 5}}, "experiences is no argument of SplitMNIST"),
    "pickle": ({"benchmark": "CORe50"}, "set scenario.unpickle=true"),
    "elsewhere": ({"benchmark": "os.system", "arguments": {"command": "true"}}, "is refused"),
    "private": ({"benchmark": "avalanche.benchmarks.classic.cmnist._make"}, "is refused"),
    "imported": ({"benchmark": "avalanche.benchmarks.classic.cmnist.Path"}, "has no Path"),
    "other part": ({"benchmark": "avalanche.benchmarks.datasets.download_utils.x"}, "is refused"),
    "no file": ({"benchmark": "scenarios.nowhere.make"}, "there is no module scenarios.nowhere"),
    "lacks": ({}, "SplitMNIST needs n_experiences"),
    "nothing to tune on": (
        {"tuning_fraction": 0.0, "arguments": {"n_experiences": 5}},
        "There is nothing to tune on",
    ),
}


@pytest.mark.parametrize(("options", "said"), BAD_BENCHMARKS.values(), ids=BAD_BENCHMARKS.keys())
def test_a_benchmark_that_can_t_be_is_refused_before_it_loads(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        Benchmark(backbone=MLP(), **options).check(Split.TUNE)


BAD_STREAMS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "no benchmark": ("nothing", {}, "made a int. It must be an Avalanche benchmark"),
    "crash": ("broken", {}, "could not make .*broken: OSError: no such host. It looks for data in"),
    "labels from zero": (
        "pictures",
        {"zero": True, "task_id": True},
        "class_ids_from_zero_in_each_exp=false",
    ),
}


@pytest.mark.parametrize(
    ("name", "arguments", "said"), BAD_STREAMS.values(), ids=BAD_STREAMS.keys()
)
def test_a_stream_that_can_t_be_is_refused(
    name: str, arguments: dict[str, Any], said: str, own: Own
) -> None:
    with pytest.raises(UserError, match=said):
        own(name, arguments=arguments).stream(Split.EVALUATE, 0)


@dataclass
class Listed:
    """A list as a dataset of three equal views."""

    samples: list[tuple[Any, int]]

    def views(self) -> Views:
        s = self.samples
        return Views(s, s, s, [label for _, label in s])


def test_samples_that_can_t_be_stored_are_refused() -> None:
    shapes = Listed([(torch.zeros(1, 2, 2), 0), (torch.full((1, 3, 3), 0.3), 0)])
    with pytest.raises(UserError, match=r"have different shapes, \[1, 2, 2\] and \[1, 3, 3\]"):
        Stored([shapes.views()], 1)
    texts = Listed([("a text", 0)])
    with pytest.raises(UserError, match="samples are str"):
        Stored([texts.views()], 1)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 2, 2)])
def test_samples_may_be_vectors_or_images(shape: tuple[int, ...]) -> None:
    values = [(torch.randn(shape, generator=torch.Generator().manual_seed(i)), 0) for i in range(4)]
    stored = Stored([Listed(values).views()], 1)
    rows = stored.source.gather(torch.arange(4))
    assert torch.equal(rows.flatten(1), torch.stack([x for x, _ in values]).flatten(1))
    assert rows.ndim == 4


def test_what_does_not_fit_into_memory_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench import machine
    from clbench.samples import MappedSource

    values = [(torch.randn(3, generator=torch.Generator().manual_seed(i)), 0) for i in range(4)]
    whole = Stored([Listed(values).views()], 1).source
    monkeypatch.setattr(machine, "available_memory", lambda: 10)
    mapped = Stored([Listed(values).views()], 1).source
    assert isinstance(mapped, MappedSource)
    every = torch.arange(4)
    assert torch.equal(mapped.gather(every), whole.gather(every))


@pytest.mark.slow
def test_split_mnist_of_avalanche_is_whole(tmp_path: Path) -> None:
    """Every image once, stored as pixels, normalised as Avalanche does."""
    archive = userspace.suite().parent / "shared" / "data" / "mnist-raw.tar.gz"
    if not archive.exists():
        pytest.skip(f"there is no {archive.name} in shared/data beside the repository")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    scenario = Benchmark(
        backbone=MLP(), data_dir=tmp_path, tuning_fraction=0.0, arguments={"n_experiences": 5}
    )
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.facts["stored"] == "pixels"
    assert sum(len(e.train or ()) for e in stream.experiences) == 60_000
    assert sum(map(len, stream.tests)) == 10_000
    assert vars(stream.transform)["mean"] == pytest.approx((0.1307,), abs=1e-5)


def test_every_listed_refusal_is_of_a_class_that_is_there() -> None:
    """A table of names must not outlive what it names."""
    import avalanche.training.plugins as plugins
    import avalanche.training.supervised as supervised

    from clbench import avalanche as ours

    known = set(itertools.chain(vars(plugins), vars(supervised)))
    assert {name for name in ours._REFUSED if name not in known} <= {"PackNetPlugin", "LFLPlugin"}
