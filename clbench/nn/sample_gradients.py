"""Mean powers of the gradients of single samples, without a loop over samples.

The gradient of one sample in a linear layer is an outer product g aᵀ of what arrives from behind
and from the front. A sum of its squares over samples is (g²)ᵀ(a²), of its magnitudes |g|ᵀ|a|: one
matrix product for a batch, and nothing of the size samples x parameters is ever made (Goodfellow
2015, "Efficient Per-Example Gradient Computations", arXiv 1510.01799). Convolutions and sequences
form the gradients of a few samples at a time; normalisation layers need no product, nor do
embeddings. All other parameters take `torch.func.vmap`, or, in models of sequences, which look at
the lengths of their inputs, one backward pass for each sample.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.errors import UserError
from clbench.nn.row_hooks import RowHook
from clbench.population.companion import present
from clbench.samples import Batch, Samples

#: From outputs [B, ..., C] and targets [B, ...]: vectors v, each of the shape of the outputs; the
#: gradients are those of v·h.
Cotangents = Callable[[Tensor, Tensor], Iterable[Tensor]]

#: Of a gradient: its magnitude or its square.
Power = Literal[1, 2]

#: Numbers to form at once where gradients of single samples have to be formed: what stays in the
#: cache of a CPU core (a slim ResNet-18 takes 0.6 of the time that 2**24 take), what fills a GPU.
LIMITS = {"cpu": 1 << 20, "cuda": 1 << 26}


def mean_gradient_powers(
    model: nn.Module,
    samples: Samples,
    cotangents: Cotangents,
    power: Power,
    *,
    names: Collection[str] | None = None,
    order: Tensor | None = None,
    batch_size: int = 128,
    of_batches: bool = False,
) -> dict[str, Tensor]:
    """E_x Σ_v |∂(v·h(x))/∂θ|^power for every parameter, with the test-time transform, in fp32.

    Args:
        model: In evaluation mode, where the samples of a batch can't act on each other.
        samples: The mean is over these.
        cotangents: What is differentiated: v, held constant, for outputs h.
        power: 1, the magnitude, or 2, the square.
        names: Parameters to differentiate; default: those that require gradients.
        order: Positions of the samples to take, [N] int64; default: all.
        batch_size: Samples in a forward pass; changes the result only with `of_batches`.
        of_batches: The power is taken of the mean gradient of each batch, and the mean is over
            batches. Cheaper, and smaller: the noise of single samples cancels in a batch.

    Returns:
        One tensor for each name, in the shape of the parameter.

    Raises:
        UserError: If a batch norm keeps no running statistics: its samples have no gradients
            of their own.
    """
    _check(model)
    if names is None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
    if order is None:
        order = torch.arange(len(samples), device=samples.index.device)
    weights = {n: p.detach().requires_grad_(n in names) for n, p in model.named_parameters()}
    totals = {name: torch.zeros_like(weights[name]) for name in names}
    companion = present()
    parts = (
        {name: torch.zeros_like(weights[name]) for name in names}
        if companion.processes > 1
        else totals
    )
    sums = _of_batch if of_batches else _of_samples
    count = 0
    for batch in samples.batches(order, batch_size):
        for name, value, partial in sums(model, weights, totals.keys(), batch, cotangents, power):
            (parts if partial else totals)[name] += value
        count += 1 if of_batches else len(batch)
    if parts is not totals:
        for name, whole in zip(parts, companion.total([*parts.values()]), strict=True):
            totals[name] += whole
    return {name: total.div_(count) for name, total in totals.items()}


#: Of each name: a sum, and whether it is only of the rows that this process has.
Sums = Iterable[tuple[str, Tensor, bool]]


def _of_batch(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    names: Collection[str],
    batch: Batch,
    cotangents: Cotangents,
    power: Power,
) -> Sums:
    outputs = functional_call(model, dict(weights), (batch.inputs,))
    chosen = [weights[name] for name in names]
    for v in cotangents(outputs.detach(), batch.targets):
        gradients = torch.autograd.grad(
            outputs, chosen, v / len(batch), retain_graph=True, materialize_grads=True
        )
        yield from ((n, _power(g, power), False) for n, g in zip(names, gradients, strict=True))


def _of_samples(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    names: Collection[str],
    batch: Batch,
    cotangents: Cotangents,
    power: Power,
) -> Sums:
    with _Recorder(model, names, power, len(batch)) as recorder:
        outputs = functional_call(model, dict(weights), (batch.inputs,))
    part = present().part
    layers = recorder.layers()
    edges = [layer.edge for layer in layers]
    known = {name for layer in layers for name in layer.names.values()}
    others = {name: weights[name].detach() for name in names if name not in known}
    fixed = {name: w.detach() for name, w in weights.items() if name not in others}
    for v in cotangents(outputs.detach(), batch.targets):
        if layers:
            arriving = torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True)
            for layer, g in zip(layers, arriving, strict=True):
                if g is not None:
                    layer.add(g)
        if others:
            by = _by_vmap if outputs.ndim == 2 else _one_by_one
            yield from by(model, others, fixed, batch.inputs, v, power)
    for layer in layers:
        named = ((layer.names[kind], value) for kind, value in layer.sums())
        yield from ((name, value, part is not None) for name, value in named)


def _by_vmap(
    model: nn.Module,
    chosen: dict[str, Tensor],
    fixed: dict[str, Tensor],
    inputs: Tensor,
    cotangent: Tensor,
    power: Power,
) -> Sums:
    def product(chosen: dict[str, Tensor], x: Tensor, v: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, {**fixed, **chosen}, (x[None],))
        return (outputs[0] * v).sum()

    each = vmap(grad(product), in_dims=(None, 0, 0))
    piece = _piece(inputs, 16 * sum(w.numel() for w in chosen.values()))
    for x, v in zip(inputs.split(piece), cotangent.split(piece), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
            gradients = each(chosen, x, v)
        yield from ((name, _power(g, power).sum(0), False) for name, g in gradients.items())


def _one_by_one(
    model: nn.Module,
    chosen: dict[str, Tensor],
    fixed: dict[str, Tensor],
    inputs: Tensor,
    cotangent: Tensor,
    power: Power,
) -> Sums:
    leaves = {name: weight.detach().requires_grad_() for name, weight in chosen.items()}
    for x, v in zip(inputs.split(1), cotangent.split(1), strict=True):
        outputs = functional_call(model, {**fixed, **leaves}, (x,))
        gradients = torch.autograd.grad(outputs, list(leaves.values()), v, materialize_grads=True)
        yield from ((n, _power(g, power), False) for n, g in zip(leaves, gradients, strict=True))


def _piece(like: Tensor, numbers: int) -> int:
    """How many samples to take at once, at so many numbers each."""
    return max(1, LIMITS.get(like.device.type, LIMITS["cpu"]) // numbers)


def _power(x: Tensor, power: Power) -> Tensor:
    return x.square() if power == 2 else x.abs()


def _check(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the gradients of single samples need a model in evaluation mode")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UserError(
                f"the batch norm {name} keeps no running statistics, so the samples of a batch act "
                "on each other and none has a gradient of its own. Use track_running_stats=True "
                "or another normalisation."
            )


class _Layer(ABC):
    """One layer in one forward pass: its input, and a handle on what arrives at its output.

    Attributes:
        names: Of "weight" and "bias" in the model, as far as they are wanted.
        edge: The place in the graph just behind the layer.
    """

    def __init__(
        self, module: nn.Module, names: dict[str, str], inputs: Tensor, output: Tensor, power: Power
    ) -> None:
        self.module: Any = module
        self.names, self.inputs, self.power = names, inputs.detach(), power
        # Not the tensor: an operation in place behind the layer would give it another meaning.
        self.edge: GradientEdge = get_gradient_edge(output)
        self.totals: dict[str, Tensor] = {}

    @staticmethod
    def fits(module: Any, inputs: Tensor) -> bool:  # noqa: ARG004
        """Whether the formulas hold for this layer and input."""
        return True

    @abstractmethod
    def add(self, g: Tensor) -> None:
        """Takes the gradients [B, ...] that arrive for one cotangent."""

    def sums(self) -> Iterable[tuple[str, Tensor]]:
        """Sums over samples and cotangents."""
        return self.totals.items()

    def count(self, kind: str, value: Tensor) -> None:
        """Adds a part of a sum."""
        if kind in self.names:
            value = value.reshape(self.module.get_parameter(kind).shape)
            known = self.totals.get(kind)
            self.totals[kind] = value if known is None else known.add_(value)


class _Rows(_Layer):
    """A linear layer that reads one row for each sample."""

    @staticmethod
    def fits(module: Any, inputs: Tensor) -> bool:  # noqa: ARG004
        return inputs.dim() == 2

    def add(self, g: Tensor) -> None:
        arrived = self.totals.get("g")
        self.totals["g"] = _power(g, self.power) + (0 if arrived is None else arrived)

    def sums(self) -> Iterable[tuple[str, Tensor]]:
        g = self.totals.get("g")
        if g is None:
            return
        if "weight" in self.names:
            yield "weight", g.T @ _power(self.inputs, self.power)
        if "bias" in self.names:
            yield "bias", g.sum(0)


class _Places(_Layer, ABC):
    """A layer that applies one matrix at many places of a sample: its gradients add up first."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """What the matrix reads, [B, groups, in, places]."""

    @abstractmethod
    def rows(self, g: Tensor) -> Tensor:
        """What arrives, [B, groups, out, places]."""

    def add(self, g: Tensor) -> None:
        rows = self.rows(g)
        if "bias" in self.names:
            self.count("bias", _power(rows.sum(3), self.power).sum(0))
        if "weight" not in self.names:
            return
        matrix = self.module.weight.numel()
        read = matrix // self.module.weight.shape[0] * rows.shape[1] * rows.shape[3]
        piece = _piece(g, matrix + read)
        for a, b in zip(rows.split(piece), self.inputs.split(piece), strict=True):
            gradients = a @ self.columns(b).mT
            _ = gradients.square_() if self.power == 2 else gradients.abs_()
            self.count("weight", gradients.sum(0))


class _Sequence(_Places):
    """A linear layer on [B, ..., in]."""

    def columns(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mT[:, None]

    def rows(self, g: Tensor) -> Tensor:
        return g.flatten(1, -2).mT[:, None]


class _Convolution(_Places):
    """A convolution of images with zeros round them."""

    @staticmethod
    def fits(module: Any, inputs: Tensor) -> bool:
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return zeros and inputs.dim() == 4

    def columns(self, x: Tensor) -> Tensor:
        m = self.module
        patches = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
        return patches.view(len(x), m.groups, -1, patches.shape[2])

    def rows(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), self.module.groups, -1, g[0, 0].numel())


class _Normalisation(_Layer):
    """Weight and bias of a layer that normalises by statistics of its own or of the sample."""

    def add(self, g: Tensor) -> None:
        kept = self.kept(g.dim())
        over = [d for d in range(1, g.dim()) if d not in kept]
        for kind, each in (("weight", g * self.normalised()), ("bias", g)):
            if kind in self.names:
                one = each.sum(over) if over else each
                self.count(kind, _power(one, self.power).sum(0))

    def kept(self, dim: int) -> range:
        """Dimensions of the output that the weight has."""
        layer = isinstance(self.module, nn.LayerNorm)
        return range(dim - len(self.module.normalized_shape), dim) if layer else range(1, 2)

    def normalised(self) -> Tensor:
        """The input as the weight meets it."""
        x, m = self.inputs, self.module
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(x, m.normalized_shape, eps=m.eps)
        if isinstance(m, nn.GroupNorm):
            return F.group_norm(x, m.num_groups, eps=m.eps)
        return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)


class _Scaled(_Layer):
    """The weight of a layer whose output is linear in it, number by number (an RMS norm)."""

    def add(self, g: Tensor) -> None:
        over = tuple(range(1, g.dim() - self.module.weight.dim()))
        each = g * self.normalised()
        self.count("weight", _power(each.sum(over) if over else each, self.power).sum(0))

    def normalised(self) -> Tensor:
        """What the weight multiplies: the output at weight 1 less that at weight 0."""
        weight = self.module.weight
        one, zero = (
            functional_call(self.module, {"weight": torch.full_like(weight, w)}, (self.inputs,))
            for w in (1.0, 0.0)
        )
        return one - zero  # type: ignore[no-any-return]


class _Embedding(_Layer):
    """A table of rows, of which each sample reads some, perhaps one several times."""

    @staticmethod
    def fits(module: Any, inputs: Tensor) -> bool:  # noqa: ARG004
        return module.max_norm is None and not module.scale_grad_by_freq

    def add(self, g: Tensor) -> None:
        rows, table = self.inputs.flatten(1), self.module.weight
        sample = torch.arange(len(rows), device=rows.device)[:, None]
        # What one sample reads several times adds up before the power.
        met, place = (rows + len(table) * sample).unique(return_inverse=True)
        flat = g.reshape(-1, table.shape[1])
        sums = flat.new_zeros(len(met), table.shape[1]).index_add_(0, place.flatten(), flat)
        rows = met % len(table)
        if self.module.padding_idx is not None:
            sums[rows == self.module.padding_idx] = 0
        total = torch.zeros_like(table, requires_grad=False)
        self.count("weight", total.index_add_(0, rows, _power(sums, self.power)))


#: Exact types: a subclass may do something else with its parameters.
_KINDS: dict[type[nn.Module], Sequence[type[_Layer]]] = {
    nn.Embedding: (_Embedding,),
    nn.RMSNorm: (_Scaled,),
    nn.Linear: (_Rows, _Sequence),
    nn.Conv2d: (_Convolution,),
    nn.BatchNorm1d: (_Normalisation,),
    nn.BatchNorm2d: (_Normalisation,),
    nn.LayerNorm: (_Normalisation,),
    nn.GroupNorm: (_Normalisation,),
}


# By name: Hugging Face has one for each family of models, without a common base class.
_RMS_NORM = re.compile(r"\w+RMSNorm$")


def _kinds(module: nn.Module) -> Sequence[type[_Layer]]:
    """The formulas that there are for a layer."""
    if _RMS_NORM.match(type(module).__name__) and set(module._parameters) == {"weight"}:
        return (_Scaled,)
    return _KINDS.get(type(module), ())


class _Record(RowHook):
    """The forward hook of a recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.recorder.record(module, inputs, output)


class _Recorder:
    """Watches a forward pass of so many samples for the layers whose formulas are known."""

    def __init__(self, model: nn.Module, names: Collection[str], power: Power, size: int) -> None:
        self.power, self.size = power, size
        owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        self.wanted: dict[nn.Module, dict[str, str]] = {}
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            own = {kind: prefix + kind for kind, p in module._parameters.items() if p is not None}
            shared = any(owners[id(module._parameters[kind])] > 1 for kind in own)
            found = {kind: name for kind, name in own.items() if name in names}
            if found and not shared and _kinds(module):
                self.wanted[module] = found
        self.calls: dict[nn.Module, list[_Layer | None]] = {m: [] for m in self.wanted}

    def __enter__(self) -> _Recorder:
        self.handles = [m.register_forward_hook(_Record(self)) for m in self.wanted]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """One call of a layer."""
        # What has no row for each sample, such as positions, is told apart by none of them.
        part = present().part
        own = len(inputs[0]) == (self.size if part is None else part.stop - part.start)
        kinds = [kind for kind in _kinds(module) if own and kind.fits(module, inputs[0])]
        arguments = module, self.wanted[module], inputs[0], output, self.power
        self.calls[module].append(kinds[0](*arguments) if kinds else None)

    def layers(self) -> list[_Layer]:
        """Those met exactly once: the gradients of several meetings would have to add up first."""
        return [calls[0] for calls in self.calls.values() if len(calls) == 1 and calls[0]]
