"""Compiled training steps: which calls are compiled, and that they compute what plain ones do."""

from __future__ import annotations

import contextvars
import copy
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf
from suite import Headless, composed, configured
from torch import Tensor, nn

from clbench import compiling, from_python, protocol, userspace
from clbench.account import Account
from clbench.conditions import Conditions, identify
from clbench.config import build, target_class
from clbench.errors import Interrupted, UserError
from clbench.nn.backbones import MLP, Backbone, ConvNet, FeatureExtractor
from clbench.nn.heads import Classifier
from clbench.population.choice import choose
from clbench.population.companion import Companion, introduce
from clbench.results import Result, RunFolder
from clbench.state import capture
from clbench.testing import ToyDrift, ToyScenario, _equal, _PreemptedAt, toy_for
from clbench.text.toy import ToyInstructions
from clbench.training import GradientStrategy, Trainer
from clbench.types import CLASSIFICATION, Scenario, Setting, Strategy
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.hft import HFT
from strategies.lwf import LwF
from strategies.replay import Replay
from strategies.tent import Tent

CPU = Conditions(device="cpu", threads=1)
COMPILED = replace(CPU, compile=True)
#: What a weight of order 1 may differ after a toy stream: kernels add in another order.
TOLERANCE = 1e-5
METHODS: dict[str, Callable[[], Strategy]] = {
    "derpp": DERpp,
    "lwf": LwF,  # keeps a copy as a teacher
    "ewc": EWC,  # takes gradients of single samples
    "hft over derpp": lambda: HFT(base=DERpp()),  # freezes other halves each time
}


@dataclass(kw_only=True)
class Dropping(Backbone):
    """A perceptron with dropout."""

    def _assemble(
        self, image_shape: tuple[int, int, int]
    ) -> tuple[FeatureExtractor, dict[str, Tensor]]:
        return _Dropping(image_shape), {}


class _Dropping(FeatureExtractor):
    n_features = 16

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = nn.Linear(torch.Size(image_shape).numel(), 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.first(x.flatten(1)).relu(), 0.5, self.training)


@dataclass
class Graphs:
    """A compiler that compiles nothing: it remembers what passes through, and hands it on."""

    made: int = 0
    sizes: list[int] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def call(*inputs: Tensor) -> Any:
            found = graph(*inputs)
            self.sizes.append(len(found[0]))
            return found

        return call


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """In the place of the compiler."""
    found = Graphs()
    monkeypatch.setattr(compiling, "BACKEND", found)
    return found


def run(
    strategy: Strategy, scenario: Scenario, conditions: Conditions, **more: Any
) -> tuple[Result, dict[str, Tensor]]:
    """A whole run, and the weights at its end."""
    result = protocol.run(scenario, strategy, conditions, **more)
    assert result.status == "complete", result.reason
    return result, weights(strategy)


def weights(strategy: Strategy) -> dict[str, Tensor]:
    assert isinstance(strategy, Trainer)
    return strategy.model.state_dict()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def counted(result: Result) -> dict[str, Any]:
    """Costs that no clock decides."""
    return {
        name: cost
        for name, cost in result.costs.items()
        if not name.endswith("seconds") and name != "peak_memory_bytes"
    }


@pytest.mark.parametrize(
    ("backend", "precision"), [("eager", "fp32"), ("eager", "bf16"), ("aot_eager", "fp32")]
)
@pytest.mark.parametrize("method", METHODS)
def test_traced_steps_learn_the_same_bits(
    method: str, backend: str, precision: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's own part, its kernels, is left out: what remains changes no number."""
    monkeypatch.setattr(compiling, "BACKEND", backend)
    backbone = MLP() if "hft" in method else ConvNet(widths=(4, 8))
    scenario = ToyScenario(backbone=backbone, n_experiences=2, epochs=2)
    plain, expected = run(METHODS[method](), scenario, replace(CPU, precision=precision))
    conditions = replace(COMPILED, precision=precision)
    traced, found = run(METHODS[method](), scenario, conditions)
    assert traced.accuracy_matrix == plain.accuracy_matrix
    assert equal(found, expected)
    assert (traced.costs.pop("compile_seconds") or 0) > 0
    assert "compile_seconds" not in plain.costs
    assert counted(traced) == counted(plain)  # passes too, which hooks on the model count


def test_only_full_batches_of_training_are_compiled(graphs: Graphs) -> None:
    """80 samples an experience make 5 batches of 15 and one of 5; each is tested in one of 40."""
    scenario = ToyScenario(batch_size=15, n_experiences=3, epochs=2, memory_size=40)
    run(Finetune(), scenario, COMPILED)
    assert graphs.sizes == 3 * 2 * 5 * [15]
    assert graphs.made == 1


def test_batches_of_new_and_stored_samples_are_both_compiled(graphs: Graphs) -> None:
    scenario = ToyScenario(batch_size=20, memory_batch_size=8, n_experiences=2, epochs=1)
    assert compiling.batch_sizes(scenario) == {20, 8, 28}
    assert compiling.batch_sizes(replace(scenario, memory_batch_size=0)) == {20, 40}
    run(Replay(), scenario, COMPILED)
    assert set(graphs.sizes) <= {20, 8, 28}
    assert set(graphs.sizes) & {8, 28}
    assert graphs.made == len(set(graphs.sizes))


@contextmanager
def compiled(sizes: set[int]) -> Iterator[Classifier]:
    """A classifier of 6x6 images in training mode, compiled for these batches."""
    torch.manual_seed(0)
    features = ConvNet(widths=(4, 8)).build((3, 6, 6))
    model = Classifier(features, nn.Linear(features.n_features, 2)).train()
    with compiling.compiled(model, sizes, lambda _: None):
        yield model


def test_evaluation_and_odd_batches_go_the_plain_way(graphs: Graphs) -> None:
    with compiled({4}) as model:
        model(torch.rand(4, 3, 6, 6))
        assert graphs.sizes == [4]
        model(torch.rand(3, 3, 6, 6))
        with torch.no_grad():
            model(torch.rand(4, 3, 6, 6))
        model.eval()(torch.rand(4, 3, 6, 6))
        assert graphs.sizes == [4]


def test_hooks_within_the_backbone_are_heeded(graphs: Graphs) -> None:
    images = torch.rand(4, 3, 6, 6)
    with compiled({4}) as model:
        model(images)
        seen: list[Tensor] = []
        part = next(m for m in model.features.modules() if isinstance(m, nn.Conv2d))
        hook = part.register_forward_hook(lambda *call: seen.append(call[-1]))
        model(images)
        assert len(seen) == 1
        assert graphs.sizes == [4]
        hook.remove()
        model(images)
        assert len(seen) == 1
        assert graphs.sizes == [4, 4]


def test_copies_compute_with_their_own_weights(graphs: Graphs) -> None:
    images = torch.rand(4, 3, 6, 6)
    with compiled({4}) as model:
        model(images)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        found = other(images)
    assert graphs.sizes == [4, 4]
    assert graphs.made == 1
    with torch.no_grad():
        assert torch.equal(found, other(images))  # after the block: not compiled
        assert not torch.equal(found, model(images))
    assert graphs.sizes == [4, 4]
    assert type(model.features) is type(ConvNet(widths=(4,)).build((3, 6, 6)))


def test_there_is_no_number_of_variants_after_which_it_gives_up(graphs: Graphs) -> None:
    import torch._dynamo.config as tracing

    before = tracing.recompile_limit
    sizes = range(2, before + 6)
    with compiled(set(sizes)) as model:
        for size in sizes:
            model(torch.rand(size, 3, 6, 6))
    assert graphs.sizes == [*sizes]
    assert tracing.recompile_limit == before


def test_one_graph_may_be_gone_through_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with compiled({4}) as model:
        loss = model(torch.rand(4, 3, 6, 6)).square().sum()
        once, twice = (
            torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_seconds_of_the_compiler_are_no_training() -> None:
    now = 0.0
    account = Account(torch.device("cpu"), lambda: now)
    account.costs["compile_seconds"] = 0.0
    account.begin()
    now = 5.0
    account.compile(3.0)
    account.train()
    now = 6.0
    account.train()
    assert account.costs["train_seconds"] == 3.0
    assert account.costs["compile_seconds"] == 3.0


@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupted_run_ends_in_the_same_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    resumed_as_whole(ToyScenario(backbone=ConvNet(widths=(4, 8)), epochs=1), step, tmp_path)


def resumed_as_whole(scenario: Scenario, step: int, folder: Path) -> Result:
    """Asserts that a run stopped within its second experience goes on to the same end."""
    whole, expected = run(DERpp(), scenario, COMPILED)
    place = RunFolder(folder, whole.run["run_id"])
    with pytest.raises(Interrupted):
        run(DERpp(), scenario, COMPILED, folder=place, progress=_PreemptedAt(1, step))
    result, found = run(DERpp(), scenario, COMPILED, folder=place)
    assert result.accuracy_matrix == whole.accuracy_matrix
    assert equal(found, expected)
    assert counted(result) == counted(whole)
    return whole


def test_it_is_part_of_a_run_only_where_it_is_asked_for() -> None:
    plain = identify(ToyScenario(), Finetune(), CPU)
    other = identify(ToyScenario(), Finetune(), COMPILED)
    assert "compile" not in CPU.identity()
    assert "compile" not in plain
    assert other["compile"] is True
    assert plain["run_id"] != other["run_id"]


def test_rows_of_a_board_are_told_apart_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench import leaderboard, results

    monkeypatch.setattr(compiling, "BACKEND", "eager")
    for on in (False, True):
        from_python.run(ToyScenario(epochs=1), Finetune(), compile=on, results_dir=tmp_path)
    (board,) = leaderboard.build(results.read(tmp_path)).boards
    assert sorted(board.table["strategy"]) == ["finetune", "finetune (compile=True)"]


@dataclass(kw_only=True)
class Answering(GradientStrategy):
    """Fine-tuning of whatever answers. **Differs from the paper:** there is none."""

    settings = frozenset({Setting.INSTRUCTION_TUNING})


@pytest.mark.parametrize(
    ("scenario", "strategy", "options", "words"),
    [
        (ToyInstructions(), Answering(), {}, ["batches of text", "compile=false"]),
        (ToyDrift(), Tent(), {}, ["test-time adaptation", "compile=false"]),
        (ToyScenario(), Finetune(), {"population": 2}, ["population=0", "compile=false"]),
        (Headless(), Finetune(), {}, ["features and a head", "Sequential", "compile=false"]),
    ],
    ids=["text", "adaptation", "population", "headless"],
)
def test_what_can_t_be_compiled_is_refused(
    scenario: Scenario, strategy: Strategy, options: Mapping[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(UserError) as error:
        protocol.run(scenario, strategy, replace(COMPILED, **options))
    assert all(word in str(error.value) for word in ["compile=true", *words])


def test_kept_features_leave_nothing_to_compile() -> None:
    from strategies.nmc import NMC

    with pytest.raises(UserError, match=r"compile=true.*cache_features=true"):
        protocol.run(ToyScenario(), NMC(), replace(COMPILED, cache_features=True))


def test_a_population_is_refused_where_it_is_asked_for() -> None:
    tree = composed("phase=tune", "population=4", "compile=true")
    with pytest.raises(UserError, match=r"population=4 does not go with compile=true.*"):
        choose(tree)
    assert choose(composed("phase=tune", "population=auto", "compile=true")) == 0


def test_processes_that_share_a_run_are_refused() -> None:
    class Two(Companion):
        processes = 2

    def attempt() -> None:
        introduce(Two())
        protocol.run(ToyScenario(), Finetune(), COMPILED)

    with pytest.raises(UserError, match=r"compile=true is for runs of one process.*compile=false"):
        contextvars.copy_context().run(attempt)


def test_a_machine_without_a_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as kernels

    monkeypatch.setattr(ToyScenario, "stream", None)  # it stops before anything is loaded
    with (
        kernels.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler \(g\+\+.*Install it"),
    ):
        from_python.run(ToyScenario(), Finetune(), compile=True, results_dir=tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(UserError, match=r"needs the headers of Python.*compile=false"):
        from_python.run(ToyScenario(), Finetune(), compile=True, results_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"compile=true needs Triton.*compile=false"):
        compiling.check_machine(torch.device("cuda"))


def near(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of a weight or statistic."""
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def labelled(name: str) -> bool:
    """Whether a strategy learns classes from labels."""
    tree = OmegaConf.load(userspace.configuration() / "strategy" / f"{name}.yaml")
    return bool(target_class({"_target_": tree._target_}, Strategy, name).settings & CLASSIFICATION)


def made(name: str) -> Strategy:
    return build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*filter(labelled, configured("strategy"))])
def test_every_strategy_learns_the_same_bits_in_traced_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    toy = toy_for(made(name), CLASSIFICATION)
    assert isinstance(toy, ToyScenario)
    scenario = replace(toy, epochs=1, n_experiences=2)
    plain, traced = made(name), made(name)
    expected = protocol.run(scenario, plain, CPU)
    found = protocol.run(scenario, traced, COMPILED)
    assert found.accuracy_matrix == expected.accuracy_matrix
    assert _equal(capture(traced), capture(plain))
    del found.costs["compile_seconds"]
    assert counted(found) == counted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [ConvNet(widths=(4, 8)), Dropping()], ids=["convnet", "drop"])
def test_kernels_learn_the_same_but_for_rounding(backbone: Backbone) -> None:
    """After a toy stream weights differ by at most 1e-5, and at most one answer of a test turns."""
    scenario = ToyScenario(backbone=backbone)
    plain, expected = run(DERpp(), scenario, CPU)
    other, found = run(DERpp(), scenario, COMPILED)
    assert near(found, expected) <= TOLERANCE
    for row, reference in zip(other.accuracy_matrix, plain.accuracy_matrix, strict=True):
        assert row == pytest.approx(reference, abs=1 / 40 + 1e-9)
    assert (other.costs["compile_seconds"] or 0) > 0


@pytest.mark.slow
def test_kernels_made_anew_end_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine of the same kind, where no kernel is kept from before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))
    scenario = ToyScenario(backbone=MLP(hidden=(32,)), epochs=1)
    whole, expected = run(DERpp(), scenario, COMPILED)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    resumed = resumed_as_whole(scenario, 7, tmp_path / "runs")
    assert resumed.accuracy_matrix == whole.accuracy_matrix
    again, found = run(DERpp(), scenario, COMPILED)
    assert equal(found, expected)
    assert again.accuracy_matrix == whole.accuracy_matrix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_a_gpu_kernels_learn_the_same_but_for_rounding() -> None:
    scenario = ToyScenario(backbone=ConvNet(widths=(4, 8)), epochs=1)
    _, expected = run(DERpp(), scenario, replace(CPU, device="cuda"))
    result, found = run(DERpp(), scenario, replace(COMPILED, device="cuda"))
    assert near(found, expected) <= TOLERANCE
    assert (result.costs["compile_seconds"] or 0) > 0
