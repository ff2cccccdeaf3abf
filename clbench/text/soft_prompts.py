"""A decoder that reads vectors before its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SoftPrompted(nn.Module):
    """A causal language model of the transformers library with a soft prompt before every row.

    What it gives belongs to the tokens alone; it is called as the decoder is by
    `clbench.text.language_model.LanguageModel`.

    Args:
        decoder: The model.

    Attributes:
        prefix: The prompt, [M, features]; None: there is none.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.prefix: Tensor | None = None

    @property
    def embedding(self) -> Tensor:
        """The vectors of all tokens, [vocabulary, features]."""
        decoder: Any = self.decoder
        found: Tensor = decoder.get_input_embeddings().weight
        return found

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> Any:
        """See the decoder; the prompt is read where nothing was read before.

        Args:
            input_ids: [B, L].
            attention_mask: Of the tokens, those read before included.
            position_ids: Of the tokens, as if there were no prompt.
            past_key_values: What is left of what was read before, prompt included.
            use_cache: Whether to leave such.
            logits_to_keep: How many of the last, or positions among `input_ids`.
        """
        told: dict[str, Any] = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        count = 0 if self.prefix is None else len(self.prefix)
        if attention_mask is not None:
            seen = attention_mask.new_ones(len(input_ids), count)
            told["attention_mask"] = torch.cat((seen, attention_mask), 1)
        if past_key_values is not None:
            if position_ids is not None:
                told["position_ids"] = position_ids + count
            return self.decoder(input_ids=input_ids, past_key_values=past_key_values, **told)
        decoder: Any = self.decoder
        read = decoder.get_input_embeddings()(input_ids)
        if self.prefix is not None:
            prompt = self.prefix.to(read.dtype).expand(len(read), -1, -1)
            read = torch.cat((prompt, read), 1)
        if position_ids is not None:
            first = torch.arange(count, device=input_ids.device).expand(len(input_ids), -1)
            told["position_ids"] = torch.cat((first, position_ids + count), 1)
        if isinstance(logits_to_keep, Tensor):
            told["logits_to_keep"] = logits_to_keep + count
        return self.decoder(inputs_embeds=read, **told)
