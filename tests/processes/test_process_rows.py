"""What can't be shared out is refused, or computed whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from clbench.errors import UserError
from clbench.processes.group import Group
from clbench.processes.peers import Peers, together
from clbench.toys import ToyDrift


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    """A group of one: all that two do, and what they tell each other reaches nobody."""
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    with together(Group(store, 0, 1, torch.device("cpu"))) as found:
        yield found


@pytest.mark.parametrize(
    ("layer", "word"), [(nn.BatchNorm1d(3), "batch norm"), (nn.Dropout(0.5), "dropout")]
)
def test_what_depends_on_the_whole_batch_is_refused(
    peers: Peers, layer: nn.Module, word: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), layer)
    peers.adopt(model)
    with pytest.raises(UserError, match=word):
        model(torch.ones(6, 4))
    assert model.eval()(torch.ones(6, 4)).shape == (6, 3)


def test_adaptation_is_refused(peers: Peers) -> None:
    with pytest.raises(UserError, match="one process"):
        peers.check(ToyDrift())


def test_a_model_that_is_watched_inside_is_computed_whole(peers: Peers) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    peers.adopt(model)
    model(torch.ones(6, 4))
    assert peers.part == slice(0, 6)
    model[0].register_forward_hook(lambda *_: None)
    model(torch.ones(6, 4))
    assert peers.part is None


class Borrowing(nn.Module):
    """Uses a weight that is not its own."""

    lent: list[Tensor]

    def __init__(self, lent: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.lent = [lent]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.lent[0]
        return out


def test_weights_from_elsewhere_get_their_gradient_too(peers: Peers) -> None:
    lent = torch.zeros(3, requires_grad=True)
    model = Borrowing(lent)
    peers.adopt(model)
    model(torch.ones(6, 4)).sum().backward()
    assert peers.part is None
    assert_close(lent.grad, torch.full((3,), 6.0))
    assert_close(model.linear.bias.grad, torch.full((3,), 6.0))


def test_gradients_of_inputs_and_unused_weights(peers: Peers) -> None:
    linear = nn.Linear(4, 3)
    model = nn.Sequential(linear)
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    peers.adopt(model)
    inputs = torch.ones(6, 4, requires_grad=True)
    model(inputs).sum().backward()
    assert unused.grad is None, "an optimizer would decay it"
    assert inputs.grad is not None
    assert_close(inputs.grad, linear.weight.detach().sum(0).expand(6, 4))
