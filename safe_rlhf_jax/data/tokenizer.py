"""Tokenizers of transformers, and the few facts about them that the rest needs."""

import dataclasses
from typing import Any

from transformers import AutoTokenizer

from safe_rlhf_jax.data.demo import TOKENIZER_PATH


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer with its end and padding tokens settled."""

    hf: Any
    eos_id: int
    pad_id: int  # may equal eos_id: masks come from lengths
    prefix: tuple[int, ...]  # special tokens that open every text, such as BOS

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Returns token ids of a text without special tokens."""
        ids: list[int] = self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Any) -> str:
        """Returns the text of token ids, special tokens skipped."""
        text: str = self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load_tokenizer(name: str) -> Tokenizer:
    """Opens "demo", a folder, or a hub id.

    Raises:
        ValueError: If it cannot be opened or has no end-of-sequence token.
    """
    source = str(TOKENIZER_PATH) if name == "demo" else name.removeprefix("hf:").removeprefix("path:")
    try:
        hf = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"tokenizer {name!r}: cannot be opened: {error}") from error
    if hf.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos_token; add one: responses end with it")
    opened = hf("a")["input_ids"]
    plain = hf("a", add_special_tokens=False)["input_ids"]
    prefix = opened[: len(opened) - len(plain)] if opened[-1] != hf.eos_token_id else opened[: -len(plain) - 1]
    pad = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
    return Tokenizer(hf, hf.eos_token_id, pad, tuple(prefix))
