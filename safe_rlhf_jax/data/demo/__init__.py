"""The embedded world: a synthetic, inoffensive assistant world in which helpfulness and harm are known.

`prompts`, `sft` and `preference` make its records; `helpfulness`, `harm` and `is_refusal` judge a response by parsing
it, and `oracle_for` turns that into measures for the report; `TOKENIZER_PATH` is the folder of its tokenizer. See
`world` for the grammar.
"""

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.demo.measures import oracle_for
from safe_rlhf_jax.data.demo.oracle import Harm, PromptInfo, harm, helpfulness, is_refusal, parse_prompt
from safe_rlhf_jax.data.demo.records import annotation, annotator_accuracy, preference, prompts, sft
from safe_rlhf_jax.data.demo.world import HARM_CATEGORIES, MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS

TOKENIZER_PATH = str(storage.path(__file__).parent / "tokenizer")

__all__ = [
    "HARM_CATEGORIES",
    "MAX_PROMPT_TOKENS",
    "MAX_RESPONSE_TOKENS",
    "TOKENIZER_PATH",
    "Harm",
    "PromptInfo",
    "annotation",
    "annotator_accuracy",
    "harm",
    "helpfulness",
    "is_refusal",
    "oracle_for",
    "parse_prompt",
    "preference",
    "prompts",
    "sft",
]
