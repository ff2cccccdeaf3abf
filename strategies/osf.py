"""OSF: orthogonal subspace fine-tuning by an adaptive singular value decomposition."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.partition import partition
from clbench.text.language_model import LanguageModel
from clbench.text.lora import require_whole
from clbench.text.optional import needed
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting, require


@dataclass(frozen=True)
class Kept:
    """The singular vectors of a matrix that stay as they are.

    Attributes:
        left: U_h, [outputs, rank].
        right: V_h, [rank, inputs].
    """

    left: Tensor
    right: Tensor

    @staticmethod
    def of(weight: Tensor, rank: int) -> Kept:
        """Those of the largest singular values."""
        left, _, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        return Kept(left[:, :rank].to(weight.dtype), right[:rank].to(weight.dtype))

    @torch.no_grad()
    def project(self, low_left: Tensor, low_right: Tensor) -> None:
        """Takes out of the trained vectors, in place, what lies in the space of the kept ones."""
        low_left -= self.left @ (self.left.T @ low_left)
        low_right -= (low_right @ self.right.T) @ self.right


@dataclass(kw_only=True)
class OSF(GradientStrategy):
    """Trains each matrix only where its large singular vectors are not.

    Paper: Nayak et al. 2025, "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for
    Continual Learning", arXiv 2504.07097. The decomposed layers are peft's OSF.

    Equation: at the beginning of an experience, for each linear layer but the head,
    W = U_h S_h V_h + U_l S_l V_l, the r largest singular values in the first term, which stays.
    The second trains, its gradients projected: ∂U_l ← (I − U_h U_hᵀ) ∂U_l,
    ∂V_l ← ∂V_l (I − V_hᵀ V_h). At its end W is put together again. With t experiences before, r is

    - "importance": n (min_share + I (share − min_share)) rounded down, for layers with n singular
      values in a block of importance I: the mean cosine between its inputs and its outputs,
      divided by the mean over blocks;
    - "growing": ⌊m · share · t⌋, m being the larger side of the matrix;
    - "constant": ⌊n · share⌋;

    and in any case from 1 to n − 1.

    Attributes:
        rank: "importance", "growing" or "constant".
        share: Part that is kept, in (0, 1]; the paper's are 0.8, 0.07 and 0.75.
        min_share: Part that is kept where nothing is important; "importance" only.
        importance_samples: Of the arriving experience, that I is measured on.

    **Differs from the paper:** after each step the factors are projected again, because Adam's
    scaling and weight decay lead out of the subspace. W is put together by adding the change of
    the trained term, so that what is kept is kept to rounding, and then decomposed anew: peft's
    `unload()`, which its guide calls between tasks, would lose what was learned. At least one
    singular vector is kept, as peft wants. Embeddings, norms and head stay as they are. Blocks
    are those of the transformer, and I is measured before each experience on its own samples;
    the text leaves both open. Rates are for small models; the released scripts have AdamW with
    lr=1e-5.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.INSTRUCTION_TUNING})

    rank: Literal["importance", "growing", "constant"] = "importance"
    share: float = 0.8
    min_share: float = 0.1
    importance_samples: int = 64
    lr: float = 0.005
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "share", above=0, at_most=1)
        require(self, "min_share", at_least=0, at_most=1)
        require(self, "importance_samples", at_least=1)
        if self.rank == "importance" and self.min_share > self.share:
            raise UserError(
                f"OSF: min_share={self.min_share} is more than share={self.share}. Lower it."
            )

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_whole("OSF", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        assert isinstance(model, LanguageModel)
        super().setup(model, context)
        decoder: Any = model.decoder
        head = decoder.get_output_embeddings()
        self._shapes = {
            name: tuple(layer.weight.shape)
            for name, layer in decoder.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
        }
        if not self._shapes:
            raise UserError("OSF decomposes torch.nn.Linear layers, of which this model has none.")
        self.learned = 0
        self.ranks: dict[str, int] = {}

    def before(self, experience: Experience) -> None:
        self.ranks = self.choose(experience)
        self.learned += 1
        model: Any = self.model
        layers = dict(model.decoder.named_modules())
        self._kept = {n: Kept.of(layers[n].weight, r) for n, r in self.ranks.items()}
        self._trained = [p for p in model.parameters() if p.requires_grad]
        config = needed("peft").OSFConfig(
            task_type="CAUSAL_LM",
            target_modules=list(self.ranks),
            # peft's "effective rank" is that of the part which is kept.
            rank_pattern={f"^{re.escape(n)}$": r for n, r in self.ranks.items()},
        )
        with warnings.catch_warnings():
            # What peft calls by its old name in transformers is nothing that users can mend.
            warnings.simplefilter("ignore")
            model.decoder = needed("peft").get_peft_model(model.decoder, config)
        layers = dict(model.decoder.get_base_model().named_modules())
        self._factors = {n: layers[n].osf_svd_params["default"] for n in self.ranks}

    def update(self, loss: Tensor) -> None:
        super().update(loss)
        for name, kept in self._kept.items():
            factors = self._factors[name]
            kept.project(factors["U_low"], factors["V_low"])

    def after(self, experience: Experience) -> None:  # noqa: ARG002
        model: Any = self.model
        model.decoder = model.decoder.merge_and_unload()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        model.eval()
        del self._kept, self._trained, self._factors

    def choose(self, experience: Experience) -> dict[str, int]:
        """How many singular vectors of each layer are kept in an experience."""
        if self.rank == "growing":
            wanted = {n: max(s) * self.share * self.learned for n, s in self._shapes.items()}
        elif self.rank == "constant":
            wanted = {n: min(s) * self.share for n, s in self._shapes.items()}
        else:
            importance = self.importance(experience)
            wanted = {
                n: min(s) * (self.min_share + importance[n] * (self.share - self.min_share))
                for n, s in self._shapes.items()
            }
        # Products such as 10 · 0.7 are a little below the whole number that they mean.
        return {
            n: max(1, min(int(round(r, 6)), min(self._shapes[n]) - 1)) for n, r in wanted.items()
        }

    @torch.no_grad()
    def importance(self, experience: Experience) -> Mapping[str, float]:
        """I of the block of each layer; 1 for layers in no block."""
        assert experience.train is not None
        blocks = {m.name.removeprefix("decoder."): m.block for m in partition(self.model)}
        found: dict[str, float] = {}
        hooks = [
            self.model.get_submodule(block).register_forward_hook(_Cosine(block, found))
            for block in dict.fromkeys(blocks.values())
        ]
        count = len(experience.train)
        generator = self.context.generator("osf.importance", torch.device("cpu"))
        some = torch.randperm(count, generator=generator)[: self.importance_samples]
        self.forward(experience.train.take(some.to(self.context.device)).inputs)
        for hook in hooks:
            hook.remove()
        mean = sum(found.values()) / len(found)
        return {n: found[blocks[n]] / mean if n in blocks else 1.0 for n in self._shapes}

    def facts(self) -> Mapping[str, Any]:
        """The kept rank of each layer in the last experience."""
        return {"kept_rank": dict(self.ranks)}


@dataclass(frozen=True)
class _Cosine:
    """Measures the mean cosine between inputs and outputs of a block."""

    block: str
    found: dict[str, float]

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        self.found[self.block] = nn.functional.cosine_similarity(inputs[0], out, -1).mean().item()
