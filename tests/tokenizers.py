"""Tokenizers of other kinds than the embedded world's, made in a moment."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from safe_rlhf_jax.data.tokenizer import load_tokenizer

CORPUS = [
    "how do i bake bread\n\n\nfirst, mix the flour\n\n  - then wait\n",
    "the the bread . how ? über naïve 你好 🙂",
]
BOS = {"<s>", "<bos>", "<|begin_of_text|>"}


def make_tokenizer(folder, special, eos, *, spaces, template=None, thoughts=(), ends=None, **config):
    """A tokenizer of byte-level BPE that joins line feeds as Llama 3's, or where `spaces` like SentencePiece's."""
    if spaces:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=special[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(decoder)
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        regex = r"\s*[\r\n]+| ?[^\s\r\n]+|\s+"
        split = pre_tokenizers.Split(pattern=Regex(regex), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *(alphabet if spaces else [])],
        initial_alphabet=[] if spaces else alphabet, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if spaces:  # bytes are tokens of the vocabulary, not added ones
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in thoughts])
    opening = next(iter(BOS & set(special)), None)
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A", special_tokens=[(opening, tokenizer.token_to_id(opening))]
        )
        config["bos_token"] = opening
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **config)
    hf.chat_template = template
    hf.save_pretrained(folder)
    if ends:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": hf.convert_tokens_to_ids(ends)}))
    return load_tokenizer(str(folder))
