"""Decoder-only models of the transformers library, and what of them is tuned."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clbench import hub
from clbench.errors import UserError
from clbench.text.language_model import LanguageModel
from clbench.text.optional import needed
from clbench.text.tokenizers import Tokenizer
from clbench.types import require


@dataclass(kw_only=True)
class Decoder(ABC):
    """A model by the transformers library; its fields are its options.

    Attributes:
        tuning: What trains: "full", all weights; "lora", low-rank updates of linear layers (Hu et
            al. 2021, arXiv 2106.09685); "peft", what `peft_config` says.
        lora_rank: r.
        lora_alpha: An update is multiplied by lora_alpha / lora_rank.
        lora_dropout: On the inputs of an update.
        lora_targets: Names of the layers that are updated; empty: all linear ones but the head.
        peft_config: Folder with the adapter_config.json of any method of the peft library.
        gradient_checkpointing: Compute activations a second time instead of keeping them.
        micro_batch_size: Rows of a training batch that are computed at once; 0: all. See
            `clbench.text.language_model`.
    """

    tuning: Literal["full", "lora", "peft"] = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    peft_config: str = ""
    gradient_checkpointing: bool = False
    micro_batch_size: int = 0

    def __post_init__(self) -> None:
        require(self, "micro_batch_size", at_least=0)
        require(self, "lora_rank", at_least=1)
        require(self, "lora_alpha", above=0)
        require(self, "lora_dropout", at_least=0, at_most=1)
        if (self.tuning == "peft") != bool(self.peft_config):
            raise UserError(
                "language_model.tuning=peft and language_model.peft_config, a folder with "
                "adapter_config.json, belong together: set both or neither."
            )

    @property
    @abstractmethod
    def title(self) -> str:
        """A name for people."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens that it reads at most."""

    @property
    @abstractmethod
    def starts_trained(self) -> bool:
        """Whether its weights come from elsewhere."""

    @abstractmethod
    def load(self, tokenizer: Tokenizer) -> nn.Module:
        """The causal language model itself, in fp32 on the CPU.

        Random weights are drawn from the global generators, which the engine seeds.
        """

    def assemble(self, tokenizer: Tokenizer, answer_length: int) -> LanguageModel:
        """The model as the suite sees it, all of it to be trained.

        Args:
            tokenizer: Of the stream.
            answer_length: Tokens of an answer at most.

        Raises:
            UserError: If it has no logit for some id of the tokenizer.
        """
        decoder: Any = self.load(tokenizer)
        rows = decoder.get_output_embeddings().weight.shape[0]
        if rows < tokenizer.size:
            raise UserError(
                f"The language model {self.title} has {rows} tokens, the tokenizer "
                f"{tokenizer.name} {tokenizer.size}. Use the tokenizer that belongs to the model."
            )
        if self.gradient_checkpointing:
            with warnings.catch_warnings():
                # Newer versions of transformers have another name for it, older ones only this one.
                warnings.simplefilter("ignore", FutureWarning)
                decoder.gradient_checkpointing_enable({"use_reentrant": False})
        facts = {"name": self.title, "weights": self.title if self.starts_trained else None}
        return LanguageModel(
            decoder, rows, tokenizer.end, answer_length, facts, self.micro_batch_size
        )

    def adapt(self, model: LanguageModel) -> None:
        """Restricts training to what `tuning` says; changes the model in place.

        Raises:
            UserError: If the peft configuration can't be read or does not fit.
        """
        if self.tuning == "full":
            return
        peft = needed("peft")
        if self.tuning == "lora":
            config = low_rank(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)
        else:
            config = self._peft_config(peft)
        try:
            with warnings.catch_warnings():
                # What peft calls by its old name in transformers is nothing that users can mend.
                warnings.simplefilter("ignore", FutureWarning)
                model.decoder = peft.get_peft_model(model.decoder, config)
        except ValueError as error:
            raise UserError(f"language_model.tuning={self.tuning} does not fit: {error}") from error

    def _peft_config(self, peft: Any) -> Any:
        folder = Path(self.peft_config).expanduser()
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"language_model.peft_config={self.peft_config} can't be read: {error}. Name a "
                "folder with the adapter_config.json that peft's save_pretrained writes."
            ) from error
        config.inference_mode = False
        return config


@dataclass(kw_only=True)
class Llama(Decoder):
    """A Llama of any size with random weights.

    Attributes:
        width: Features of a token.
        depth: Blocks.
        heads: Of the attention.
        inner: Hidden units of a feed-forward layer.
        context_length: Tokens that it reads at most.
        spread: Standard deviation of the random weights.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    inner: int = 344
    context_length: int = 256
    spread: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "width", "depth", "heads", "inner", at_least=1)
        require(self, "context_length", at_least=4)
        require(self, "spread", above=0)
        if self.width % (2 * self.heads):
            raise UserError(
                f"language_model.width={self.width} must be an even multiple of "
                f"language_model.heads={self.heads}: the rotary embedding turns pairs of features."
            )

    @property
    def title(self) -> str:
        return f"llama {self.width}x{self.depth}"

    @property
    def context(self) -> int:
        return self.context_length

    @property
    def starts_trained(self) -> bool:
        return False

    def load(self, tokenizer: Tokenizer) -> nn.Module:
        transformers = needed("transformers")
        config = transformers.LlamaConfig(
            vocab_size=tokenizer.size,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            max_position_embeddings=self.context_length,
            initializer_range=self.spread,
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model


@dataclass(kw_only=True)
class Published(Decoder):
    """A causal language model from a folder or from the Hugging Face hub.

    Attributes:
        where: A folder, or a name on the hub.
        weights: "trained", as they are published, or "random": the configuration alone.
        context_length: Tokens that it reads at most; 0: as its configuration says.
    """

    where: str
    weights: Literal["trained", "random"] = "trained"
    context_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "context_length", at_least=0)

    @property
    def title(self) -> str:
        return self.where

    @property
    def context(self) -> int:
        declared = int(getattr(self._config(), "max_position_embeddings", 0) or 0)
        if not (self.context_length or declared):
            raise UserError(
                f"The configuration of {self.where} does not say how long its context is. "
                "Set language_model.context_length."
            )
        return self.context_length or declared

    @property
    def starts_trained(self) -> bool:
        return self.weights == "trained"

    def load(self, tokenizer: Tokenizer) -> nn.Module:  # noqa: ARG002
        automatic = needed("transformers").AutoModelForCausalLM
        config = self._config()
        try:
            if not self.starts_trained:
                model: nn.Module = automatic.from_config(config, dtype=torch.float32)
                return model
            with hub.verified(self.where, "model"):
                model = automatic.from_pretrained(
                    self._where,
                    config=config,
                    dtype=torch.float32,
                    local_files_only=hub.cached_only(self.where),
                )
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error
        return model

    def _config(self) -> Any:
        try:
            return needed("transformers").AutoConfig.from_pretrained(
                self._where, local_files_only=hub.cached_only(self.where)
            )
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error

    @property
    def _where(self) -> str:
        folder = Path(self.where).expanduser()
        return str(folder) if folder.is_dir() else self.where

    def _refusal(self, error: Exception) -> UserError:
        if hub.cached_only(self.where):
            return UserError(
                f"language_model.where={self.where} is no folder, not in the hub's cache, and the "
                "Hugging Face hub can't be reached. Where there is a network: "
                "model.save_pretrained('FOLDER') and its tokenizer's; then set "
                "language_model.where=FOLDER."
            )
        return UserError(
            f"language_model.where={self.where}: no causal language model could be loaded from "
            f"there: {error} Name a folder with config.json and model.safetensors, or a name on "
            "the Hugging Face hub."
        )


def low_rank(rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> Any:
    """peft's configuration of low-rank updates.

    Args:
        rank: r.
        alpha: An update is multiplied by alpha / rank.
        dropout: On the inputs of an update.
        targets: Names of the layers that are updated; empty: all linear ones but the head.
    """
    return needed("peft").LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or "all-linear",
        task_type="CAUSAL_LM",
    )


def facts(model: LanguageModel) -> Mapping[str, Any]:
    """Plain data for the result file about a model as a run starts with it."""
    parameters = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return {**model.facts, "parameters": sum(parameters), "trained_parameters": sum(trained)}
