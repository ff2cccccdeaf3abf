"""AdaContrast: pseudo-labels from neighbours, and contrast with a queue of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.adaptation import GradientAdaptation
from clbench.nn.batch_statistics import batch_norms, train_only
from clbench.nn.contrastive_views import MoCoViews
from clbench.nn.entropy import marginal_entropy
from clbench.nn.heads import Classifier
from clbench.nn.teacher import follow, frozen_copy
from clbench.pretrained import require_classifier
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class AdaContrast(GradientAdaptation):
    """Contrastive test-time adaptation, in its online form.

    Chen et al. 2022, "Contrastive Test-Time Adaptation", CVPR, arXiv 2204.10377, for streams as
    Döbler et al. 2023, arXiv 2211.13081, have it in their code. A model, and a key model that
    follows it (θ' ← m θ' + (1 − m) θ). For each batch, with a weak view and two strong ones:

    - The pseudo-label ŷ is the class of the largest mean probability among the `neighbours`
      entries of the bank with the most similar features (cosine); for the first `warm_up`
      samples it is the model's own answer to the weak view.
    - With the features q of a strong view, those k of the other by the key model, and keys k_j
      of length 1 in the queue, all over `temperature`,

          loss = CE(logits of the strong view, ŷ)
               − log exp(q·k) / (exp(q·k) + Σ_j exp(q·k_j) over keys with another pseudo-label)
               − H(mean probabilities of the strong view)

      is minimised over all weights; k joins the queue with ŷ.
    - The key model's features and probabilities of the weak view join the bank.

    Queue and bank hold the last `queue_size` entries; the queue begins with random directions
    and labels. Then the batch is answered anew, which is scored. Batch norms use the statistics
    of the batch while the model learns, and move the stored ones, with which it answers;
    `predict` too. See `MoCoViews` for the views.

    **Differs from the paper:** a key is masked by the pseudo-label that it came with, where the
    code already has the labels of the batch in the places that its keys take next. Dropout is
    off. No layer is new, so none has ten times the learning rate. The paper's own experiments
    train for several epochs on the target; there the views are cropped too, and the bank begins
    full.

    Attributes:
        lr: Learning rate, constant.
        optimizer: "sgd" in Nesterov's form where there is momentum, as in the code, or "adam".
        queue_size: Entries of the queue, and of the bank.
        key_momentum: m.
        temperature: Of the contrast.
        neighbours: Entries of the bank that vote.
        warm_up: In samples.
        contrast: Factor of the second part of the loss.
        diversity: Factor of the third.
    """

    lr: float = 2e-4
    optimizer: Literal["adam", "sgd"] = "sgd"
    weight_decay: float = 1e-4
    queue_size: int = 16384
    key_momentum: float = 0.999
    temperature: float = 0.07
    neighbours: int = 10
    warm_up: int = 1024
    contrast: float = 1.0
    diversity: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "queue_size", "neighbours", at_least=1)
        require(self, "warm_up", "contrast", "diversity", at_least=0)
        require(self, "key_momentum", at_least=0, at_most=1)
        require(self, "temperature", above=0)

    def prepare(self) -> None:
        self._classifier = require_classifier("adacontrast", self.model)
        self.key_model = frozen_copy(self._classifier)
        self.descent = self.make_optimizer(train_only(self.model, [*self.model.parameters()]))
        self._views = MoCoViews(self.context)
        device, size = self.context.device, self.queue_size
        width, n_outputs = self._classifier.features.n_features, self.context.n_outputs
        generator = self.context.generator("queue")
        directions = torch.randn(size, width, generator=generator, device=device)
        self.keys = F.normalize(directions)
        self.key_labels = torch.randint(n_outputs, (size,), generator=generator, device=device)
        self.bank = torch.zeros(size, width, device=device)
        self.bank_probabilities = torch.zeros(size, n_outputs, device=device)
        self.seen = 0

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam" or not self.momentum:
            return super().make_optimizer(parameters)
        return torch.optim.SGD(
            parameters,
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
            fused=True,
        )

    def adapt(self, batch: Batch) -> Tensor:
        weak = self._views.weak(batch.raw)
        query, key = self._views.strong(batch.raw), self._views.strong(batch.raw)
        for norm in batch_norms(self.model) + batch_norms(self.key_model):
            norm.train()
        labels = self.pseudo_labels(weak)
        features, logits = self._answer(self._classifier, query)
        follow(self.key_model, self._classifier, self.key_momentum)
        with torch.no_grad():
            keys = F.normalize(self._answer(self.key_model, key)[0])
        loss = F.cross_entropy(logits, labels) - self.diversity * marginal_entropy(logits)
        loss = loss + self.contrast * self._contrast(F.normalize(features), keys, labels)
        self.descent.zero_grad()
        loss.backward()
        self.descent.step()
        self._remember(weak, keys, labels)
        self.model.eval()
        return self.predict(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    @torch.no_grad()
    def pseudo_labels(self, weak: Tensor) -> Tensor:
        """ŷ of weak views, [B] int64."""
        features, logits = self._answer(self._classifier, weak)
        if self.seen < self.warm_up:
            return logits.argmax(1)
        filled = min(self.seen, self.queue_size)
        similar = F.normalize(features) @ F.normalize(self.bank[:filled]).T
        nearest = similar.topk(min(self.neighbours, filled)).indices
        return self.bank_probabilities[nearest].mean(1).argmax(1)

    def _answer(self, model: Classifier, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, n_features] and logits [B, n_outputs], in fp32."""
        with self.context.autocast():
            features: Tensor = model.features(inputs)
            logits: Tensor = model.head(features)
        return features.float(), logits.float()

    def _contrast(self, queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
        """The second part of the loss; queries and keys of length 1."""
        own = (queries * keys).sum(1, keepdim=True)
        others = (queries @ self.keys.T).masked_fill(labels[:, None] == self.key_labels, -torch.inf)
        scores = torch.cat((own, others), 1) / self.temperature
        return (scores.logsumexp(1) - scores[:, 0]).mean()

    @torch.no_grad()
    def _remember(self, weak: Tensor, keys: Tensor, labels: Tensor) -> None:
        """Puts a batch in the place of the oldest entries of queue and bank."""
        features, logits = self._answer(self.key_model, weak)
        size, end = self.queue_size, self.seen + len(labels)
        places = torch.arange(self.seen, end, device=labels.device)[-size:] % size
        self.seen = end
        for store, new in (
            (self.keys, keys),
            (self.key_labels, labels),
            (self.bank, features),
            (self.bank_probabilities, logits.softmax(1)),
        ):
            store.index_copy_(0, places, new[-size:])
