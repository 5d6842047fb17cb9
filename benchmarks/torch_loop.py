"""Times one PPO-Lagrangian iteration in turn with the same in PyTorch and transformers, by phase, on this CPU.

    python -m benchmarks.torch_loop --config benchmarks/configs/rl_step_tiny.yaml [--json benchmarks/results/NAME.json]

Each side is a process of its own, compiled and warm before anything counts, and idle while the other one is timed.
Ratios are PyTorch's seconds by ours: above 1 ours is faster. XLA_FLAGS of the environment are those of our side.

The PyTorch loop has the same sizes, tokens and arithmetic: six whole networks (`LlamaForCausalLM`, and decoders with
one output per token), scaled-dot-product attention, `torch.compile` around every pass and loss, a static cache in
generation, logits and values on response positions only, gradients only in the update, and fused AdamW.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
import yaml

from benchmarks.rl_step import build, environment, hyperparameters, phase_calls, seconds
from safe_rlhf_jax.host_memory import keep_freed_memory
from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.step import make_step

if importlib.util.find_spec("torch"):
    import torch
    import transformers
    from torch.nn import functional

PHASES = ("iteration", "generation", "scoring", "update")  # iteration first: in memory that nothing has fragmented yet
SIGNALS = ("reward", "cost")
KL_SIGN = {"reward": -1, "cost": +1}
Calls = Iterator[tuple[str, Callable[[], Any]]]


def log_probs(policy: Any, tokens: Any, mask: Any, prompt: int) -> Any:
    """Log-probability of each response token, [B, T]; `prompt` is S."""
    hidden = policy.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    logits = policy.lm_head(hidden).flatten(0, 1)
    targets = tokens[:, prompt:]
    return -functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def outputs(network: Any, tokens: Any, mask: Any, columns: slice) -> Any:
    """Output of a score model at each token of the columns."""
    hidden = network.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state[:, columns]
    return network.score(hidden)[..., 0]


def next_token(policy: Any, tokens: Any, mask: Any, cache: Any) -> Any:
    """Samples the token after those given, [B, 1]; the mask has all columns of the cache."""
    logits = policy(tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return torch.multinomial(functional.softmax(logits, -1), 1)


def masked_mean(x: Any, mask: Any) -> Any:
    """Mean over the tokens of each sequence, then over sequences."""
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def policy_loss(policy: Any, tokens: Any, mask: Any, old: Any, advantages: Any, prompt: int, clip: float) -> Any:
    """Clipped surrogate; `old` are the log-probabilities of the rollout."""
    new, real = log_probs(policy, tokens, mask, prompt), mask[:, prompt:]
    ratio = ((new - old) * real).clamp(-20, 20).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(surrogate, real)


def value_loss(critic: Any, tokens: Any, mask: Any, old: Any, returns: Any, prompt: int, clip: float) -> Any:
    """Clipped value loss; `old` are the values of the rollout."""
    values, real = outputs(critic, tokens, mask, slice(prompt - 1, -1)), mask[:, prompt:]
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), real)


def gae(rewards: Any, values: Any, real: Any, gamma: float, gae_lambda: float) -> tuple[Any, Any]:
    """Advantages and returns, [B, T]."""
    rewards, values = rewards * real, values * real
    deltas = rewards + gamma * functional.pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.empty_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages, advantages + values


class TorchLoop:
    """The networks, optimizers and λ; a method per phase."""

    def __init__(self, spec: dict[str, Any], compiled: bool = True):
        self.hp, self.prompt = hyperparameters(spec, recompute=True), spec["prompt_length"]
        fields = family("llama").config_to_hf(ModelConfig(**spec["model"]))
        config = transformers.LlamaConfig(**fields, num_labels=1, classifier_dropout=0.0, attn_implementation="sdpa")
        torch.manual_seed(0)
        policy, scorer = transformers.LlamaForCausalLM, transformers.LlamaForTokenClassification
        self.actor, self.reference = (policy(config) for _ in range(2))
        self.reference.load_state_dict(self.actor.state_dict())
        self.scorers, self.critics = ({s: scorer(config) for s in SIGNALS} for _ in range(2))
        for network in (self.reference, *self.scorers.values()):
            network.requires_grad_(False)
        adamw = functools.partial(torch.optim.AdamW, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.trained = {"actor": self.actor, **self.critics}
        self.optimizers = {name: adamw(network.parameters()) for name, network in self.trained.items()}
        self.log_multiplier, self.window = torch.zeros(()), torch.zeros(0)
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, (spec["batch_size"], self.prompt))
        self.prompts = torch.tensor(tokens)
        self.cache = transformers.StaticCache(config=config, max_cache_len=self.prompt + self.hp.response_length)
        heads = config.num_key_value_heads
        self.cache.early_initialization(len(tokens), heads, config.head_dim, torch.float32, torch.device("cpu"))
        compile_ = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.log_probs, self.outputs, self.next_token = map(compile_, (log_probs, outputs, next_token))
        self.policy_loss, self.value_loss = map(compile_, (policy_loss, value_loss))

    def generation(self) -> tuple[Any, Any]:
        """Samples a response to each prompt; returns tokens and mask, [B, L]."""
        with torch.inference_mode():
            self.cache.reset()
            mask = torch.ones(len(self.prompts), self.prompt + self.hp.response_length, dtype=torch.long)
            token, tokens = self.prompts, [self.prompts]
            for _ in range(self.hp.response_length):
                token = self.next_token(self.actor, token, mask, self.cache)
                tokens.append(token)
            rollout = torch.cat(tokens, 1)
        return rollout.clone(), mask.clone()  # no inference tensors: the update differentiates by them

    def scoring(self, rollout: tuple[Any, Any]) -> dict[str, Any]:
        """Returns log-probabilities, those of the reference, scores and values of a rollout."""
        values = slice(self.prompt - 1, -1)
        with torch.no_grad():
            return {
                "old": self.log_probs(self.actor, *rollout, self.prompt),
                "reference": self.log_probs(self.reference, *rollout, self.prompt),
                "scores": {s: self.outputs(self.scorers[s], *rollout, slice(-1, None))[:, 0] for s in SIGNALS},
                "values": {s: self.outputs(self.critics[s], *rollout, values) for s in SIGNALS},
            }

    def move_multiplier(self, costs: Any) -> None:
        """One step of ascent in log λ by the mean of the newest 128 costs."""
        self.window = torch.cat([self.window, costs])[-128:]
        self.log_multiplier += 0.1 * self.log_multiplier.exp() * self.window.mean()

    def update(self, rollout: tuple[Any, Any], scored: dict[str, Any]) -> dict[str, Any]:
        """Advantages, then an optimizer step per minibatch and trained network; returns the last losses and norms."""
        hp, (tokens, mask), old = self.hp, rollout, scored["old"]
        real, metrics = mask[:, self.prompt :], {}
        advantages, returns = {}, {}
        for s in SIGNALS:
            scores = KL_SIGN[s] * hp.kl_coeff * (old - scored["reference"])
            scores[:, -1] += scored["scores"][s]  # no response ends early
            scores = scores.clamp(-hp.clip_range_score, hp.clip_range_score)
            advantages[s], returns[s] = gae(scores, scored["values"][s], real, hp.gamma, hp.gae_lambda)
        multiplier = self.log_multiplier.exp()
        combined = (advantages["reward"] - multiplier * advantages["cost"]) / (1 + multiplier)
        for rows in torch.randperm(len(tokens)).chunk(hp.minibatches):
            for name in self.trained:
                total = torch.zeros(())
                for part in rows.chunk(hp.microbatches):
                    loss = self.loss(name, tokens, mask, scored, combined, returns, part) / hp.microbatches
                    loss.backward()
                    total += loss.detach()
                metrics[name] = total, self.step(name)
        return metrics

    def loss(self, name: str, tokens: Any, mask: Any, scored: Any, combined: Any, returns: Any, rows: Any) -> Any:
        """Loss of a trained network on some rows."""
        if name == "actor":
            given = scored["old"][rows], combined[rows], self.prompt, self.hp.clip_range_ratio
            return self.policy_loss(self.actor, tokens[rows], mask[rows], *given)
        given = scored["values"][name][rows], returns[name][rows], self.prompt, self.hp.clip_range_value
        return self.value_loss(self.critics[name], tokens[rows], mask[rows], *given)

    def step(self, name: str) -> Any:
        """Clips the gradient of a network and moves it; returns the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained[name].parameters(), 1.0, foreach=True)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return norm

    def iteration(self) -> None:
        """All of it."""
        rollout = self.generation()
        scored = self.scoring(rollout)
        self.move_multiplier(scored["scores"]["cost"])
        self.update(rollout, scored)


def torch_calls(spec: dict[str, Any], compiled: bool = True) -> Calls:
    """Yields the name and the call of each phase of the PyTorch loop."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loop = TorchLoop(spec, compiled)
    yield "iteration", loop.iteration
    rollout = loop.generation()
    scored = loop.scoring(rollout)
    yield "generation", loop.generation
    yield "scoring", lambda: loop.scoring(rollout)
    yield "update", lambda: loop.update(rollout, scored)


def our_calls(spec: dict[str, Any]) -> Calls:
    """Yields the name and the call of each phase of ours; `iteration` is the one program that training runs."""
    networks, hp, state, frozen, prompts = build(spec, recompute=True)
    box, key = [state], jax.random.key(0)
    del state  # donated
    step = jax.jit(make_step(networks, ALGORITHMS["ppo_lag"], hp), donate_argnums=0)

    def run_step() -> Any:
        box[0], metrics = step(box[0], frozen, prompts, key)
        return metrics

    yield "iteration", run_step
    yield from phase_calls(networks, hp, box, frozen, prompts, key).items()


def facts(side: str) -> dict[str, Any]:
    """Versions and threads of a side, of the process that calls."""
    if side == "torch":
        return {
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()
        }  # fmt: skip
    threads = len(os.sched_getaffinity(0))  # what XLA's pool has
    return {**environment(), "threads": threads, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def serve(side: str, spec: dict[str, Any], eager: bool, repeats: int, connection: Connection) -> None:
    """A side's process. Answers `next`: builds the next phase and warms it up; `time`: times it; `end`: facts."""
    keep_freed_memory()
    calls = torch_calls(spec, compiled=not eager) if side == "torch" else our_calls(spec)
    for request in iter(connection.recv, "end"):
        if request == "time":
            connection.send(seconds(call, repeats, has_run=True))
            continue
        name, call = next(calls)
        start = time.perf_counter()
        for _ in range(2):
            jax.block_until_ready(call())
        connection.send((name, time.perf_counter() - start))
    connection.send(facts(side))


class Side:
    """The other end of a side's process."""

    def __init__(self, name: str, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(name, *arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies is noticed

    def ask(self, request: str) -> Any:
        """Returns the answer to a request."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, OSError):
            sys.exit(f"the process of {self.name} has died; its messages are above")


def compare(spec: dict[str, Any], *, pairs: int, repeats: int, eager: bool) -> Iterator[dict[str, Any]]:
    """Times both sides in turn, phase by phase; yields what there is of the result after each phase."""
    sides = [Side(name, spec, eager, repeats) for name in ("ours", "torch")]
    result: dict[str, Any] = {name: {} for name in ("warm_up_seconds", "seconds", "medians", "ratios", "least_ratio")}
    for phase in PHASES:
        warm_up = {}
        for side in sides:
            name, warm_up[side.name] = side.ask("next")
            assert name == phase
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(pairs):
            for side in sides:
                times[side.name].append(side.ask("time"))
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["torch"], strict=True)]
        result["warm_up_seconds"][phase], result["seconds"][phase] = warm_up, times
        result["medians"][phase] = {name: statistics.median(values) for name, values in times.items()}
        result["ratios"][phase], result["least_ratio"][phase] = ratios, min(ratios)
        yield result
    yield {"environment": {side.name: side.ask("end") for side in sides}} | result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="sizes, such as benchmarks/configs/rl_step_tiny.yaml")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--pairs", type=int, default=5, help="times that each side is timed, in turn")
    parser.add_argument("--repeats", type=int, default=3, help="calls that are timed in each; the median counts")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed: pip install -e '.[torch]'")
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compiling counts in full
    spec = yaml.safe_load(pathlib.Path(options.config).read_text())
    settings = {"pairs": options.pairs, "repeats": options.repeats, "eager": options.eager}
    for part in compare(spec, **settings):
        result = {"config": spec, **settings} | part
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
        if "environment" not in result:
            phase = list(result["medians"])[-1]
            times, ratios = result["medians"][phase], result["ratios"][phase]
            print(f"{phase:12s} ours {times['ours']:8.3f} s   torch {times['torch']:8.3f} s   torch by ours in pairs: "
                  f"{' '.join(f'{ratio:.2f}' for ratio in ratios)}, least {min(ratios):.2f}", flush=True)  # fmt: skip
    for name, warm_up in result["warm_up_seconds"].items():
        print(f"warm-up of {name:12s} ours {warm_up['ours']:6.1f} s   torch {warm_up['torch']:6.1f} s")


if __name__ == "__main__":
    main()
