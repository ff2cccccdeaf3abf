"""What methods that prompt a frozen vision transformer share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.vit import add_prefix, vision_transformer
from clbench.pretrained import in_order, require_classifier, require_vision_transformer
from clbench.samples import Batch, Samples
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario


@dataclass(kw_only=True)
class PromptStrategy(GradientStrategy, ABC):
    """Learns prompts and the head of a classifier whose vision transformer stays as it is.

    The query of an image is its feature vector by the transformer without prompts: the class
    token after the final norm, unless the backbone pools otherwise. So every image goes through
    the transformer twice, the first time without gradients; where training images are not
    augmented, their queries are computed once for all epochs.

    The loss is the cross-entropy over the classes of the experience alone, so that those of
    earlier ones are not pushed down; an answer never names a class that has not come yet.
    """

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_vision_transformer(type(self).__name__, scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        classifier = require_classifier(type(self).__name__, model)
        self._vit, self._features = vision_transformer(model), classifier.features
        self._head = classifier.head
        self._features.requires_grad_(False)
        self._width = self._vit.embed_dim
        self._known: tuple[Batch, Tensor] | None = None
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=context.device)

    def add_prompts(self, prompts: nn.Module) -> None:
        """Makes what is to train a part of the model."""
        self.model.add_module("prompts", prompts.to(self.context.device))

    @property
    def prompt_generator(self) -> torch.Generator:
        """Draws the start of prompts: on the CPU, so that it is the same on every device."""
        return self.context.generator("prompts", torch.device("cpu"))

    def before(self, experience: Experience) -> None:
        """Notes the classes of the experience."""
        classes = torch.tensor(experience.classes, device=self.context.device)
        self._arriving = torch.zeros_like(self.met).index_fill(0, classes, True)
        self.met |= self._arriving

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._features.eval()

    def batches(self, samples: Samples, epochs: int, batch_size: int) -> Iterator[Batch]:
        """See `Trainer`; with queries in advance where every epoch would give the same ones."""
        batches = super().batches(samples, epochs, batch_size)
        if epochs == 1 or samples.transform.augments:
            yield from batches
            return
        known = torch.cat([self.queries(b.inputs) for b in in_order(samples, batch_size)])
        index, order = samples.index.sort()
        for batch in batches:
            self._known = batch, known[order[torch.searchsorted(index, batch.index)]]
            yield batch
        self._known = None

    def queries_of(self, batch: Batch) -> Tensor:
        """`queries` of the inputs of a batch."""
        if self._known is not None and self._known[0] is batch:
            return self._known[1]
        return self.queries(batch.inputs)

    @torch.no_grad()
    def queries(self, inputs: Tensor) -> Tensor:
        """Features without prompts, [B, n_features] in fp32."""
        with self.context.autocast():
            features: Tensor = self._features(inputs)
        return features.float()

    def prefixed(self, inputs: Tensor, prefixes: Mapping[int, Tensor]) -> Tensor:
        """Features with prefixes to the keys and values of some blocks.

        Args:
            inputs: [B, C, H, W].
            prefixes: For each block, [L, D], or [B, L, D] for each sample its own: the first half
                of the tokens are keys, the second half values.

        Returns:
            [B, n_features].
        """
        with ExitStack() as stack, self.context.autocast():
            for block, prefix in prefixes.items():
                keys, values = prefix.chunk(2, dim=-2) if prefix.shape[-2] else (prefix, prefix)
                stack.enter_context(add_prefix(self._vit.blocks[block], keys, values))
            features: Tensor = self._features(inputs)
        return features

    def cross_entropy(self, features: Tensor, targets: Tensor) -> Tensor:
        """Over the classes of the experience."""
        return self.context.objective.loss(self._masked(features, self._arriving), targets)

    def answers(self, features: Tensor) -> Tensor:
        """Outputs of all classes that have come, [B, n_outputs] in fp32; the others: the least."""
        return self._masked(features, self.met)

    def _masked(self, features: Tensor, classes: Tensor) -> Tensor:
        with self.context.autocast():
            outputs: Tensor = self._head(features)
        # Finite: outputs of classes that have not come yet must not be infinite.
        return outputs.float().masked_fill(~classes, torch.finfo(torch.float32).min)

    def blocks(
        self, option: str, chosen: Sequence[int] | None, default: Sequence[int]
    ) -> list[int]:
        """The blocks to prompt: those that the user chose, or the default.

        Raises:
            UserError: If the transformer has no such block, or one is named twice.
        """
        blocks = list(default if chosen is None else chosen)
        depth = len(self._vit.blocks)
        if len({*blocks}) < len(blocks) or not {*blocks} <= {*range(depth)}:
            raise UserError(
                f"strategy.{option}={blocks}: this vision transformer has the blocks 0 to "
                f"{depth - 1}; name each at most once, or set strategy.{option}=null."
            )
        return blocks
