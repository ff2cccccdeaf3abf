"""Instructions met so far, in groups; which group an instruction or a prompt belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.samples import Batch, Samples
from clbench.text.encoding import ANSWER
from clbench.text.instructions import text_source
from clbench.text.tokenizers import Tokenizer

#: Different instructions that an experience adds, at most.
AT_MOST = 100


class Codebook:
    """Groups of instructions, compared by words: the mean cosine of TF-IDF vectors over all pairs.

    English stop words and single letters don't count. Source: Qiao et al. 2025, "Large Continual
    Instruction Assistant", arXiv 2410.10868.

    Attributes:
        groups: The instructions of each group.
    """

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._fitted: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, instructions: Sequence[str], group: int | None = None) -> None:
        """Puts instructions into a group; None: into a new one."""
        if group is None:
            self.groups.append([])
            group = -1
        known = self.groups[group]
        known.extend(text for text in instructions if text not in known)
        self._fitted = None

    def compared(self, instructions: Sequence[str]) -> Tensor:
        """Similarity of some instructions, taken together, to each group, [K] in [0, 1].

        Frequencies of words are those of all instructions, these included.
        """
        every = [text for group in self.groups for text in group]
        vectorizer, means = self._fit([*every, *instructions])
        if vectorizer is None:
            return torch.zeros(len(self))
        mine = np.asarray(vectorizer.transform(instructions).mean(0))
        return torch.from_numpy(means @ mine[0])

    def of_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Similarity of each prompt to each group, [N, K] in [0, 1].

        Words that no instruction has don't count: they are what an instruction is applied to.
        """
        if self._fitted is None:
            self._fitted = self._fit([text for group in self.groups for text in group])
        vectorizer, means = self._fitted
        if vectorizer is None:
            return torch.zeros(len(prompts), len(self))
        return torch.from_numpy(vectorizer.transform(prompts) @ means.T)

    def _fit(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """A fitted vectorizer and the mean vector of each group; None where there is no word."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(stop_words="english")
        words = vectorizer.build_analyzer()
        if not any(words(text) for text in texts):
            return None, None
        vectorizer.fit(texts)
        means = [np.asarray(vectorizer.transform(group).mean(0))[0] for group in self.groups]
        return vectorizer, np.stack(means) if means else np.zeros((0, len(vectorizer.vocabulary_)))

    def state_dict(self) -> dict[str, Any]:
        """The groups."""
        return {"groups": [list(group) for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes copies of what `state_dict` gave."""
        self.groups = [list(group) for group in state["groups"]]
        self._fitted = None


def instructions_of(samples: Samples) -> list[str]:
    """The different instructions of some samples, in their order; no more than `AT_MOST`.

    What has no instruction is one itself, as a whole.
    """
    source = text_source(samples)
    examples = (source.examples[row] for row in samples.index.tolist())
    return list(dict.fromkeys(e.instruction or e.input for e in examples))[:AT_MOST]


def prompts_of(rows: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text that stands before the first mark of each row.

    Args:
        rows: Codes, [B, L].
        tokenizer: That made them.
    """
    texts = []
    for row in rows.tolist():
        codes = row[: row.index(ANSWER)] if ANSWER in row else row
        texts.append(tokenizer.decode([code for code in codes if code >= 0]))
    return texts


def in_groups(batch: Batch, place: Tensor, predict: Callable[[int, Batch], Tensor]) -> Tensor:
    """Outputs for a batch whose samples belong to different groups.

    Args:
        batch: Without labels.
        place: The group of each sample, [B].
        predict: Outputs of a group for some samples of the batch.
    """
    parts, rows = [], []
    for group in place.unique().tolist():
        mine = (place == group).nonzero().flatten().to(batch.inputs.device)
        some = replace(
            batch, inputs=batch.inputs[mine], raw=batch.raw[mine], index=batch.index[mine]
        )
        parts.append(predict(group, some))
        rows.append(mine)
    return torch.cat(parts)[torch.cat(rows).argsort()]
