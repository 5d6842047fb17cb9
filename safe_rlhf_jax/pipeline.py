"""Text in, text and scores out: policies and scorers for use from Python, `chat` and scripts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.data.templates import PROBE, Template, default_template, load_template
from safe_rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.inference.stream import columns
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import ScoreType
from safe_rlhf_jax.models.peft_heads import tokenizer_folder
from safe_rlhf_jax.ops import sequence_scores
from safe_rlhf_jax.types import PromptBatch

Prompt = str | Sequence[Message]  # a user's message, or a conversation that ends with one


def turns(prompt: Prompt) -> list[Message]:
    """Returns a prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def pad(rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens i32[B, width] and mask bool[B, width]."""
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        real = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, real], mask[i, real] = row, True
    return tokens, mask


class Network:
    """A module with its variables, tokenizer and template.

    Raises:
        UserError: If the network embeds too few of the tokenizer's tokens.
    """

    def __init__(self, name: str, module: Any, variables: Any, tokenizer: Tokenizer, template: Template):
        rows = module.config.vocab_size
        if tokenizer.lacking(rows):
            raise UserError(
                f"{name}: vocab_size {rows} is smaller than the tokenizer's {tokenizer.vocab_size}: it was trained "
                "with another tokenizer"
            )
        self.module = module.clone(config=dataclasses.replace(module.config, unused_rows=tokenizer.holes(rows)))
        self.variables, self.tokenizer, self.template = variables, tokenizer.for_rows(rows), template

    def reads_as(self, other: "Network") -> bool:
        """Says whether texts have the same tokens as in another network."""
        ours, theirs = (encode(PROBE, network.template, network.tokenizer).ids for network in (self, other))
        return ours == theirs and not self.tokenizer.differing(other.tokenizer)


class Policy(Network):
    """A language model for generation: `policy(["a prompt", …])` returns a list of responses."""

    def __call__(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 256, temperature: float = 1.0, seed: int = 0
    ) -> list[str]:
        """Samples a response to each prompt.

        Args:
            prompts: Texts, or conversations [{role, content}, …] that end with the user.
            max_tokens: Maximum number of response tokens.
            temperature: 0 is greedy.
            seed: Of sampling.

        Returns:
            The texts of the responses, special tokens left out.

        Raises:
            UserError: If prompt and response do not fit into the positions of the model.
        """
        rows = [encode(turns(p), self.template, self.tokenizer).ids for p in prompts]
        longest, config = max(map(len, rows)), self.module.config
        room = config.generated_length
        if longest + max_tokens > room:
            scaled = f", within which {config.rope_scaling.kind} encodes alike" if room < config.max_positions else ""
            raise UserError(
                f"a prompt of {longest} tokens + max_tokens {max_tokens} exceed the model's {room} positions{scaled}"
            )
        tokens, mask = pad(rows, columns(longest, room - max_tokens), left=True)
        batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(len(tokens), jnp.int32))
        sampling = Sampling(temperature=temperature)
        rollout = self.generate(self.variables["params"], batch, jax.random.key(seed), max_tokens, sampling)
        responses = [np.asarray(row)[np.asarray(real)] for row, real in zip(*map(np.asarray, rollout), strict=True)]
        return [self.tokenizer.decode(ids) for ids in responses]

    @functools.cached_property
    def generate(self) -> Any:
        """The compiled sampler: (params, prompts, key, T, sampling) -> responses i32[B, T], mask bool[B, T]."""

        def run(params: Any, prompts: PromptBatch, key: jax.Array, length: int, sampling: Sampling) -> Any:
            tokenizer = self.tokenizer
            rollout = generate(
                self.module, params, prompts, key, response_length=length,
                eos_id=self.template.ends(tokenizer), pad_id=tokenizer.pad_id, sampling=sampling,
            )  # fmt: skip
            return rollout.tokens[:, -length:], rollout.mask[:, -length:]

        return jax.jit(run, static_argnums=(3, 4))


class Scorer(Network):
    """A reward or cost model: `scorer(prompts, responses)` returns f32[B]."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """Scores complete responses, end-of-sequence token included.

        Args:
            prompts: Texts, or conversations [{role, content}, …] that end with the user.
            responses: The response to each prompt.

        Returns:
            f32[B], in units of the model.

        Raises:
            UserError: If a text has more tokens than the model has positions.
        """
        texts = [
            [*turns(prompt), {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return self.score_tokens([encode(text, self.template, self.tokenizer).ids for text in texts])

    def score_answers(
        self, policy: Policy, conversation: Sequence[Message], answers: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Scores a policy's response tokens to conversations, f32[B]; as text, if the tokens differ here."""
        if not self.reads_as(policy):
            return self([conversation] * len(answers), [policy.tokenizer.decode(ids) for ids in answers])
        prompt = encode(list(conversation), policy.template, policy.tokenizer).ids
        return self.score_tokens([[*prompt, *ids] for ids in answers])

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores token ids as they are, f32[B].

        Raises:
            UserError: If a text has more tokens than the model has positions.
        """
        longest, room = max(map(len, rows)), self.module.config.max_positions
        if longest > room:
            raise UserError(f"a text of {longest} tokens exceeds the scorer's {room} positions")
        return np.asarray(self.score(self.variables, *pad(rows, columns(longest, room), left=False)))

    @functools.cached_property
    def score(self) -> Any:
        """The compiled score: (variables, tokens i32[B, L], mask bool[B, L]) -> f32[B]."""
        return jax.jit(lambda variables, tokens, mask: sequence_scores(self.module, variables, tokens, mask))


def load_policy(path_or_id: str, *, template: str | Template | None = None, dtype: str = "float32",
                tokenizer: Tokenizer | None = None) -> Policy:  # fmt: skip
    """Opens a language model for use.

    Args:
        path_or_id: A folder or a hub id.
        template: A name as in `load_template`, or a template; by default the tokenizer's own chat template, or "plain"
            if there is none.
        dtype: Of parameters and matmuls.
        tokenizer: By default the one beside the model.

    Returns:
        The policy.

    Raises:
        MissingModelError: If there is no such model.
        UserError: If it cannot be opened, or the template is unknown.
    """
    return Policy(path_or_id, *open_network(path_or_id, "lm", template, dtype, tokenizer, None))


def load_scorer(path_or_id: str, *, template: str | Template | None = None, dtype: str = "float32",
                tokenizer: Tokenizer | None = None, score_type: ScoreType | None = None) -> Scorer:  # fmt: skip
    """Opens a reward or cost model for use; refuses a folder without a score head, or of the other kind.

    Args:
        path_or_id: A folder or a hub id.
        template: As in `load_policy`.
        dtype: Of parameters and matmuls.
        tokenizer: By default the one beside the model.
        score_type: Its use, "reward" or "cost"; by default the folder's.

    Returns:
        The scorer.

    Raises:
        MissingModelError: If there is no such model.
        UserError: If it cannot be opened, holds no scores or those of another kind, or the template is unknown.
    """
    return Scorer(path_or_id, *open_network(path_or_id, "score", template, dtype, tokenizer, score_type))


def open_network(path_or_id: str, head: Any, template: str | Template | None, dtype: str, tokenizer: Tokenizer | None,
                 score_type: ScoreType | None) -> tuple[Any, Any, Tokenizer, Template]:  # fmt: skip
    """Returns module, variables, tokenizer and template."""
    folder = hf.resolve(path_or_id)
    hf.read_config(folder)  # a clearer error than a tokenizer's for a file with wrong contents
    tokenizer = tokenizer or load_tokenizer(str(tokenizer_folder(folder)))
    if not isinstance(template, Template):
        template = load_template(template or default_template(tokenizer), tokenizer)
    module, variables = hf.load(folder, head, dtype, score_type=score_type, as_stored=head == "score")
    return module, variables, tokenizer, template
