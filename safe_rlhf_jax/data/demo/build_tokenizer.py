"""Trains the tokenizer of the embedded world and writes it to `tokenizer/`.

    python -m safe_rlhf_jax.data.demo.build_tokenizer [FOLDER]

A byte-level BPE over lower-case letters, space, newline, "." and ",": every text of those characters survives encoding
and decoding. It is trained until every word of the world is one token; then the pieces that only led to a word are
dropped, which halves the vocabulary (`ignore_merges` finds whole words without them, as in Llama 3). Other words fall
back to letters. Rebuilding gives the same file, byte for byte.
"""

import json
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from safe_rlhf_jax.data.demo import TOKENIZER_PATH, preference, prompts, sft

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3
# Letters and punctuation; Ġ and Ċ are what byte-level BPE writes for space and newline.
ALPHABET = [*"abcdefghijklmnopqrstuvwxyz.,", "Ġ", "Ċ"]


def corpus() -> Iterator[str]:
    """The training texts, formatted as the model sees them: prompts with their newline, and responses."""
    for prompt in prompts("train"):
        yield prompt["prompt"] + "\n"
    for demonstration in sft("train"):
        yield demonstration["messages"][1]["content"]
    for pair in preference("train"):
        yield pair["response_0"]
        yield pair["response_1"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains and prunes the tokenizer. It adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than the words need
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ALPHABET,
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    texts = list(corpus())
    tokenizer.train_from_iterator(texts, trainer)
    used = {token for encoding in tokenizer.encode_batch(texts) for token in encoding.tokens}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_prune(tokenizer, used.union(SPECIAL_TOKENS, ALPHABET)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _prune(tokenizer: Tokenizer, kept: set[str]) -> Tokenizer:
    """The tokenizer with only the kept tokens, in their order, and the merges among them."""
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    tokens = sorted(kept, key=model["vocab"].__getitem__)
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    model["merges"] = [pair for pair in model["merges"] if kept.issuperset((*pair, "".join(pair)))]
    model["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(spec))


def main() -> None:
    """Writes the tokenizer to the folder named on the command line, or to the package."""
    build_tokenizer().save_pretrained(sys.argv[1] if len(sys.argv) > 1 else TOKENIZER_PATH)


if __name__ == "__main__":
    main()
