"""Joint training against fine-tuning on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.nn.joined import join
from clbench.protocol import run
from clbench.samples import Samples, TensorSource
from clbench.testing import ToyScenario
from clbench.types import Experience, Split
from strategies.finetune import Finetune
from strategies.joint import Joint

Make = Callable[..., Any]


def test_with_one_experience_it_is_fine_tuning(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench(n_experiences=1)
    joint, finetune = one.learned(Joint(momentum=0.9)), one.learned(Finetune(momentum=0.9))
    assert same_weights(joint.model, finetune.model)


def test_each_row_is_a_training_of_its_own_on_all_samples_so_far(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    """What came before leaves no trace but the state of the random numbers."""
    one = bench()
    joint = one.learned(Joint(), 0)
    with torch.no_grad():
        for parameter in joint.model.parameters():
            parameter.fill_(torch.nan)
    states = {k: g.get_state() for k, g in joint.context.generators.items()}
    one.steps.clear()
    one.teach(joint, 1)
    assert sum(one.steps) == 5 * (80 + 80)

    finetune = one.prepare(Finetune())
    for key, state in states.items():
        finetune.context.generator(key.partition("@")[0]).set_state(state)
    experiences = one.stream.experiences[:2]
    everything = join([e.train for e in experiences])
    finetune.learn(Experience(1, "both", everything, (0, 1, 2, 3)))
    assert same_weights(joint.model, finetune.model)


def test_what_it_goes_back_to_counts_as_kept() -> None:
    """Or a reference that has all the data would pass for one that keeps nothing."""
    toy = ToyScenario(epochs=1)
    stream = toy.stream(Split.EVALUATE, 0)
    everything = sum(len(e.train) for e in stream.experiences if e.train is not None)
    conditions = Conditions(device="cpu")
    assert run(toy, Joint(), conditions).costs["memory_samples"] == everything
    assert run(toy, Finetune(), conditions).costs["memory_samples"] == 0


def test_it_may_go_on_from_the_last_model(bench: Make, same_weights: Callable[..., bool]) -> None:
    one = bench()
    joint, finetune = one.prepare(Joint(from_scratch=False)), one.prepare(Finetune())
    everything = join([e.train for e in one.stream.experiences[:2]])
    one.teach(joint, 0, 1)
    one.teach(finetune, 0)
    finetune.learn(Experience(1, "both", everything, (0, 1, 2, 3)))
    assert same_weights(joint.model, finetune.model)


def test_experiences_may_lie_in_different_sources(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench()
    joint, other = one.learned(Joint()), one.prepare(Joint())
    apart = []
    for e in one.stream.experiences:
        whole = e.train.take(torch.arange(len(e.train)))
        source = TensorSource(whole.raw, whole.targets)
        samples = Samples(source, torch.arange(len(whole)), e.train.transform)
        apart.append(Experience(e.index, e.name, samples, e.classes))
    for experience in apart:
        other.context.seen = apart[: experience.index + 1]
        other.learn(experience)
    assert same_weights(joint.model, other.model)


def test_it_keeps_no_memory(bench: Make) -> None:
    assert bench().learned(Joint()).memory_samples == 0


def test_without_the_earlier_experiences_it_says_so(bench: Make) -> None:
    one = bench()
    joint = one.prepare(Joint())
    with pytest.raises(UserError, match="base"):
        joint.learn(one.stream.experiences[0])
