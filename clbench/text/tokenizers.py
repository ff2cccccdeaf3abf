"""Text to token ids and back: bytes, what the stream itself teaches, or a published tokenizer."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench import cache, hub
from clbench.errors import UserError
from clbench.text.optional import needed


class Tokenizer(ABC):
    """Turns text into ids below `size`; what the text says never becomes a special token.

    Attributes:
        name: For people and for the result.
        size: Ids that there are.
        start: Stands before every prompt; None: nothing does.
        end: Stands behind every answer.
    """

    name: str
    size: int
    start: int | None
    end: int

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens have none."""

    def facts(self) -> Mapping[str, Any]:
        """Plain data for the result file."""
        return {"name": self.name, "size": self.size}


class Bytes(Tokenizer):
    """The bytes of UTF-8, and two ids more: it needs no file and knows every script."""

    name = "bytes"
    start, end, size = 256, 257, 258

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Trained(Tokenizer):
    """Byte-pair encoding learned from given text, by the tokenizers library; kept in the cache.

    Args:
        texts: What to learn from.
        size: Ids to make, at most; bytes and special tokens take 258 of them.
        cache_dir: The cache folder; None: the user's.
    """

    _SPECIAL = ("<start>", "<end>")

    def __init__(self, texts: Sequence[str], size: int, cache_dir: Path | None = None) -> None:
        tokenizers = needed("tokenizers")
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
        key = {"version": 1, "library": tokenizers.__version__, "size": size, "texts": digest}

        def make() -> dict[str, Any]:
            made = self._train(texts, size).to_str().encode()
            return {"json": np.frombuffer(made, np.uint8)}

        folder = cache_dir or cache.default_folder()
        content = bytes(cache.arrays(folder, "tokenizer", key, make, mmap=False)["json"])
        self._bpe = tokenizers.Tokenizer.from_str(content.decode())
        self._bpe.encode_special_tokens = True
        self.name, self.size = "trained", self._bpe.get_vocab_size()
        self.start, self.end = (self._bpe.token_to_id(word) for word in self._SPECIAL)
        self._sha256 = hashlib.sha256(content).hexdigest()

    def _train(self, texts: Iterable[str], size: int) -> Any:
        from tokenizers import Tokenizer as BPE
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(self._SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return bpe

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._bpe.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._bpe.decode(list(ids), skip_special_tokens=True))

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), "sha256": self._sha256}


class Published(Tokenizer):
    """A tokenizer of the transformers library.

    Args:
        where: A folder, or a name on the Hugging Face hub.

    Raises:
        UserError: If it can't be loaded, or has no end-of-sequence token.
    """

    def __init__(self, where: str) -> None:
        transformers = needed("transformers")
        folder = Path(where).expanduser()
        try:
            with hub.verified(where, "model"):
                self._inner = transformers.AutoTokenizer.from_pretrained(
                    str(folder) if folder.is_dir() else where,
                    local_files_only=hub.cached_only(where),
                )
        except (OSError, ValueError) as error:
            if hub.cached_only(where):
                raise UserError(
                    f"scenario.tokenizer={where} is no folder, not in the hub's cache, and the "
                    "Hugging Face hub can't be reached. Where there is a network: "
                    "tokenizer.save_pretrained('FOLDER'); then set scenario.tokenizer=FOLDER."
                ) from error
            raise UserError(
                f"scenario.tokenizer={where}: no tokenizer could be loaded from there: {error} "
                "Name a folder with tokenizer.json, a name on the Hugging Face hub, bytes or "
                "trained."
            ) from error
        if self._inner.eos_token_id is None:
            raise UserError(
                f"scenario.tokenizer={where} has no end-of-sequence token, which has to stand "
                "behind every answer. Set eos_token in its tokenizer_config.json."
            )
        self.name, self.size = where, len(self._inner)
        self.start, self.end = self._inner.bos_token_id, self._inner.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self._inner(list(texts), add_special_tokens=False, split_special_tokens=True)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._inner.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
