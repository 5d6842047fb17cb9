"""Tokenizers of transformers, with their end and padding tokens."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.demo import TOKENIZER_PATH
from safe_rlhf_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer with its end and padding tokens settled."""

    hf: Any
    eos_id: int  # written if a template ends a turn without a token of its own
    pad_id: int  # may equal eos_id: masks come from lengths
    prefix: tuple[int, ...]  # special tokens that open every text, such as BOS
    ends: tuple[int, ...] = ()  # tokens that end a response: eos_id, and others named by model or template
    rows: int | None = None  # of the smallest embedding that reads the tokens; a text with a later token is unusable

    def __post_init__(self) -> None:
        """Adds EOS to the end tokens."""
        object.__setattr__(self, "ends", tuple(sorted({self.eos_id, *self.ends})))

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs for every token: the largest id and one, added tokens and holes included."""
        return max(self.texts) + 1

    @cached_property
    def texts(self) -> Mapping[int, str]:
        """{id: token}."""
        return {i: token for token, i in self.hf.get_vocab().items()}

    def holes(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Returns ranges [start, stop) of the rows of an embedding without a token."""
        known = sorted(i for i in self.texts if i < rows)
        edges = zip([-1, *known], [*known, rows], strict=True)
        return tuple((low + 1, high) for low, high in edges if high > low + 1)

    def lacking(self, rows: int) -> list[int]:
        """Returns the tokens beyond the rows of an embedding that texts need.

        Texts do not need added tokens that neither open nor end them, such as those of images: a text with one is
        unusable.
        """
        spare = self.hf.added_tokens_decoder.keys() - {self.eos_id, *self.prefix}
        return sorted(i for i in self.texts if i >= rows and i not in spare)

    def for_rows(self, rows: int) -> "Tokenizer":
        """Returns the tokenizer for embeddings of that many rows; EOS pads if they have no row for padding."""
        pad_id = self.pad_id if self.pad_id < rows else self.eos_id
        return dataclasses.replace(self, rows=rows, pad_id=pad_id)

    def differing(self, other: "Tokenizer") -> list[int]:
        """Returns the ids with another token in another tokenizer, or whose token has another id there."""
        theirs = {token: i for i, token in other.texts.items()}
        return [
            i
            for i, token in sorted(self.texts.items())
            if other.texts.get(i, token) != token or theirs.get(token, i) != i
        ]

    def encode(self, text: str) -> list[int]:
        """Returns token ids of a text without the special tokens that open or close it."""
        if not self.hf.is_fast:
            written: list[int] = self.hf.encode(text, add_special_tokens=False)
            return written
        ids: list[int] = self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def continuation(self, text: str, encode: Callable[[str], list[int]] | None = None) -> list[int]:
        """Returns token ids, by `encode`, of a text that follows another; SentencePiece would open it with a space."""
        encode = encode or self.encode
        for before in "\na0":  # the first whose tokens do not merge with the text
            opened, both = encode(before), encode(before + text)
            if both[: len(opened)] == opened:
                return both[len(opened) :]
        return encode(text)

    def decode(self, ids: Any) -> str:
        """Returns the text of token ids, special tokens skipped."""
        text: str = self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def quoted(self, ids: Iterable[int]) -> str:
        """Describes tokens, such as `'<eos>' (1), '<end_of_turn>' (106)`."""
        return ", ".join(f"{self.texts.get(i, '?')!r} ({i})" for i in ids)


def load_tokenizer(name: str) -> Tokenizer:
    """Opens "demo", a folder, or a hub id. A generation_config.json beside it names further end tokens.

    Raises:
        DataError: If it cannot be opened or has no end-of-sequence token.
    """
    source = str(TOKENIZER_PATH) if name == "demo" else name.removeprefix("hf:").removeprefix("path:")
    folder = storage.expanded(source)
    try:
        with storage.local_copy(folder if storage.is_folder(folder) else source) as opened:
            hf = AutoTokenizer.from_pretrained(opened, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"tokenizer {name!r}: cannot be opened: {advice(error, folder)}") from error
    if hf.eos_token_id is None:
        raise DataError(f"tokenizer {name!r} has no eos_token; add one: responses end with it")
    pad = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
    known = set(hf.get_vocab().values())
    ends = [i for i in stored_ends(folder) if i in known]
    return Tokenizer(hf, hf.eos_token_id, pad, opening(hf), tuple(ends))


def opening(hf: Any) -> tuple[int, ...]:
    """Returns the special tokens with which a tokenizer opens every text; those that it appends are not ours."""
    whole, plain = hf("a")["input_ids"], hf("a", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:start])


def advice(error: Exception, folder: storage.Path) -> str:
    """Returns an error of transformers in one line, or the package that a SentencePiece file needs."""
    files = [file.name for file in storage.matching(folder, "*.model")]
    if files and importlib.util.find_spec("sentencepiece") is None:
        return f"{files[0]} is a SentencePiece file; to read it: pip install 'safe_rlhf_jax[sentencepiece]'"
    return " ".join(str(error).split())[:500]


def stored_ends(folder: storage.Path) -> tuple[int, ...]:
    """Returns the tokens that end a response of the model in a folder: `eos_token_id`, one or several.

    As in transformers, from generation_config.json, or from config.json if there is none.

    Raises:
        DataError: If it is neither a token id nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        if storage.is_file(folder / name):
            try:
                ends = json.loads(storage.read_text(folder / name)).get("eos_token_id")
            except (ValueError, AttributeError):
                continue  # the model is refused with the reason
            if ends is not None:
                several = ends if isinstance(ends, list) else [ends]
                if any(type(end) is not int for end in several):
                    raise DataError(f"{folder / name}: eos_token_id is {ends!r}; write a token id, or a list of them")
                return tuple(several)
    return ()
