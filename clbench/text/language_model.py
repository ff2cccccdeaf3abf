"""A decoder-only model as a function of rows of codes: it reads answers, gives them, or chooses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clbench.text.encoding import ANSWER, PADDING


@dataclass(frozen=True)
class _Rows:
    """A batch of rows, told apart into prompts and answers.

    Attributes:
        codes: [B, L].
        real: Where a token is, [B, L] bool.
        mark: How many ANSWER marks stand up to here, [B, L].
        prompt: Tokens of each prompt, [B].
        answer: Tokens behind the first mark of each row, [B].
        longest_prompt, shortest_prompt, longest_answer, longest, marks: Of the batch.
    """

    codes: Tensor
    real: Tensor
    mark: Tensor
    prompt: Tensor
    answer: Tensor
    shortest_prompt: int
    longest_prompt: int
    longest_answer: int
    longest: int
    marks: int

    @staticmethod
    def of(codes: Tensor) -> _Rows:
        codes = codes.long()
        real, mark = codes >= 0, (codes == ANSWER).cumsum(1)
        prompt = (real & (mark == 0)).sum(1)
        answer = real.sum(1) - prompt
        # One wait for the device, however many numbers.
        numbers = (
            prompt.amin(),
            prompt.amax(),
            answer.amax(),
            (prompt + answer).amax(),
            mark[:, -1].amax(),
        )
        return _Rows(codes, real, mark, prompt, answer, *torch.stack(numbers).tolist())


class LanguageModel(nn.Module):
    """A causal language model of the transformers library, as the suite sees it.

    What it makes of a row [prompt, ANSWER, ...] depends on what is behind the mark:

    - an answer: logits of each of its tokens given all before, [B, answer_length, V]; 0 behind
      its end. What loss, distillation and Fisher information are about;
    - nothing: the answer that greedy decoding gives, [B, answer_length]: ids, PADDING behind the
      end token; NaN in the whole row if a logit was not finite;
    - several answers, each behind a mark of its own: their log-likelihoods log p(answer|prompt),
      summed over tokens, [B, number of answers]; -inf where a row has fewer.

    The rows of a batch are of one kind. Padding is taken out first, wherever it stands, so it
    changes no output; what is computed is as wide as the longest row.

    Args:
        decoder: Called with `input_ids` and what else it declares of `attention_mask`,
            `position_ids`, `past_key_values`, `use_cache` and `logits_to_keep`.
        vocabulary: V.
        end: Id of the end token.
        answer_length: Tokens of an answer at most, the end token included.
        facts: Plain data for the result file.
        micro_batch_size: Rows of a training batch that are computed at once; 0: all. A step then
            needs the memory of so many rows, as with gradient accumulation, whatever a method
            makes of the outputs; what is not kept is computed a second time.
    """

    def __init__(
        self,
        decoder: nn.Module,
        vocabulary: int,
        end: int,
        answer_length: int,
        facts: Mapping[str, Any] | None = None,
        micro_batch_size: int = 0,
    ) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.decoder = decoder
        self.vocabulary, self.end, self.answer_length = vocabulary, end, answer_length
        self.facts = dict(facts or {})
        # ALiBi and recurrent models have no positions to be told.
        self._positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class.

        Args:
            inputs: Rows of codes, [B, L] of any integer type.
        """
        rows = _Rows.of(inputs)
        if rows.marks > 1:
            return self._choose(rows)
        if not rows.longest_answer:
            return self._answer(rows)
        if self.training and 0 < self.micro_batch_size < len(inputs):
            parts = inputs.split(self.micro_batch_size)
            return torch.cat([checkpoint(self._read_some, p, use_reentrant=False) for p in parts])
        return self._read(rows)

    def _read_some(self, inputs: Tensor) -> Tensor:
        return self._read(_Rows.of(inputs))

    def _read(self, rows: _Rows) -> Tensor:
        """Logits of given answers."""
        # What the last token predicts is never asked.
        width = max(rows.longest - 1, 1)
        ids = _aligned(rows.codes, rows.real, width + 1)[:, :width]
        first = rows.shortest_prompt - 1
        keep = torch.arange(first, width, device=ids.device)
        logits = self._decode(ids, keep=keep).logits
        steps = torch.arange(rows.longest_answer, device=ids.device)
        at = (rows.prompt - 1 - first)[:, None] + steps
        asked = logits.gather(
            1, at.clamp(max=len(keep) - 1)[..., None].expand(-1, -1, logits.shape[2])
        )
        asked = asked.masked_fill((steps >= rows.answer[:, None])[..., None], 0)
        return F.pad(asked, (0, 0, 0, self.answer_length - rows.longest_answer))

    @torch.no_grad()
    def _answer(self, rows: _Rows) -> Tensor:
        """Greedy decoding, a token of every row at a time."""
        ids, mask, positions = self._questions(rows)
        count, device = len(ids), ids.device
        answers = torch.full((count, self.answer_length), float(PADDING), device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        finite = torch.ones(count, dtype=torch.bool, device=device)
        out = self._decode(ids, mask, positions, keep=1, remember=True)
        for step in range(self.answer_length):
            logits = out.logits[:, -1, : self.vocabulary].float()
            finite &= logits.isfinite().all(1) | done
            token = logits.argmax(1)
            answers[:, step] = torch.where(done, PADDING, token)
            done = done | (token == self.end)
            if step + 1 == self.answer_length or bool(done.all()):
                break
            mask = torch.cat((mask, mask.new_ones(count, 1)), 1)
            positions = positions[:, -1:] + 1
            out = self._decode(
                token[:, None], mask, positions, keep=1, remember=True, past=out.past_key_values
            )
        return answers.masked_fill(~finite[:, None], torch.nan)

    def _choose(self, rows: _Rows) -> Tensor:
        """Log-likelihoods of given answers; the prompts are read once for all of them."""
        options, known = _branches(rows)
        count, number, length = options.shape
        ids, mask, positions = self._questions(rows)
        out = self._decode(ids, mask, positions, keep=1, remember=True)
        first = out.logits[:, -1:, : self.vocabulary].float().log_softmax(-1)
        scores: Tensor = first.expand(-1, number, -1).gather(2, options[:, :, :1]).squeeze(2)
        if length > 1:
            past = out.past_key_values
            past.batch_repeat_interleave(number)
            flat, seen = options.flatten(0, 1), known.flatten(0, 1)
            steps = torch.arange(length - 1, device=ids.device)
            out = self._decode(
                flat[:, :-1],
                torch.cat((mask.repeat_interleave(number, 0), seen[:, :-1].long()), 1),
                rows.prompt.repeat_interleave(number)[:, None] + steps,
                keep=length - 1,
                remember=True,
                past=past,
            )
            later = out.logits[..., : self.vocabulary].float().log_softmax(-1)
            chosen = later.gather(2, flat[:, 1:, None]).squeeze(2)
            chosen = chosen.masked_fill(~seen[:, 1:], 0)
            scores = scores + chosen.sum(1).view(count, number)
        return scores.masked_fill(~known[:, :, 0], -torch.inf)

    def _questions(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts with their ends one below the other: ids, mask and positions, [B, P] each."""
        width = rows.longest_prompt
        real = rows.real & (rows.mark == 0)
        ids = _aligned(rows.codes, real, width, width - rows.prompt)
        place = torch.arange(width, device=ids.device) - (width - rows.prompt)[:, None]
        return ids, (place >= 0).long(), place.clamp(min=0)

    def _decode(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        keep: int | Tensor,
        remember: bool = False,
        past: Any = None,
    ) -> Any:
        told: dict[str, Any] = {"use_cache": remember, "logits_to_keep": keep}
        if mask is not None:
            told["attention_mask"] = mask
        if positions is not None and self._positions:
            told["position_ids"] = positions
        if past is not None:
            told["past_key_values"] = past
        return self.decoder(input_ids=ids, **told)


def _aligned(codes: Tensor, real: Tensor, width: int, start: Tensor | None = None) -> Tensor:
    """The real codes of each row without gaps, [B, width]; 0 elsewhere.

    Args:
        codes: [B, L].
        real: Which of them, [B, L] bool.
        width: Of the result.
        start: Column of the first code of each row, [B]; default: 0.
    """
    column = real.cumsum(1) - 1
    if start is not None:
        column = column + start[:, None]
    # What is not real goes to a last column, which is cut off.
    column = column.masked_fill(~real, width)
    out = codes.new_zeros(len(codes), width + 1)
    return out.scatter_(1, column, codes.masked_fill(~real, 0))[:, :width]


def _branches(rows: _Rows) -> tuple[Tensor, Tensor]:
    """The answers of each row: ids, and where there are any, [B, number, length] each."""
    begun = rows.real & (rows.mark > 0)
    count = rows.real.cumsum(1)
    before = count.masked_fill(rows.codes != ANSWER, 0).cummax(1).values
    within = count - before - 1
    length = int(within.masked_fill(~begun, 0).amax()) + 1
    size = rows.marks * length
    place = ((rows.mark - 1) * length + within).masked_fill(~begun, size)
    shape = (len(rows.codes), size + 1)
    ids = rows.codes.new_zeros(shape).scatter_(1, place, rows.codes.masked_fill(~begun, 0))
    known = torch.zeros(shape, dtype=torch.bool, device=ids.device).scatter_(1, place, begun)
    view = (len(rows.codes), rows.marks, length)
    return ids[:, :-1].view(view), known[:, :-1].view(view)
