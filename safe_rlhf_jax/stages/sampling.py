"""Shared by stages that sample several responses per prompt: the compiled sampler, its batches, limits by prompt."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples, load_prompts
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.errors import NonFiniteError
from safe_rlhf_jax.inference.best_of_n import make_sampler
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.metrics import ProgressBar
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.host_signals import HostSignal, host_scores
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches

Sampled = dict[str, np.ndarray]  # tokens [B, n, T], length [B, n], a score [B, n] for every scorer
MANY = 0.5  # share of truncated responses of which a stage warns
Response = dict[str, Any]  # its text, and whether it has ended


def sampler_of(
    run: Run,
    stage: cfg.SampledPrompts | cfg.SampleStage | cfg.RedTeamStage,
    policy: Any,
    scorers: dict[str, Any],
    number: int | None = None,
) -> Callable[..., Any]:
    """Returns the compiled sample(params, scorer variables, prompts, key); `number` of responses, else the stage's."""
    return make_sampler(
        policy,
        scorers,
        num_responses=number or stage.responses_per_prompt,
        response_length=stage.max_response_length,
        eos_id=run.ends,
        pad_id=run.tokenizer.pad_id,
        end_id=run.end_id,
        sampling=Sampling(temperature=stage.temperature),
    )


def sampled(
    run: Run,
    sample: Callable[[Any, jax.Array], Any],
    prompts: Examples,
    batch_size: int,
    key: jax.Array,
    name: str,
    *,
    host: Mapping[str, HostSignal],
    start: int = 0,
) -> Iterator[tuple[np.ndarray, Sampled]]:
    """Yields rows of the prompts and their samples, on the host.

    Args:
        run: The run.
        sample: (prompts on the mesh, key) -> arrays.
        prompts: The prompts.
        batch_size: Prompts at once.
        key: Batch i uses `fold_in(key, i)`.
        name: Of the progress bar.
        host: Signals that score the responses' texts.
        start: Number of batches sampled before.

    Raises:
        NonFiniteError: If a score is not finite.
    """
    batches = in_order(prompts, batch_size)
    bar = ProgressBar(name, len(batches), start=start, keys=())
    for i, (batch, rows) in list(enumerate(batches))[start:]:
        out: Sampled = run.get(sample(run.put(batch), jax.random.fold_in(key, i)))
        out |= scores_of_several(run, host, prompts, batch.row, out)
        bad = [field for field, array in out.items() if not np.isfinite(array).all()]
        if bad:
            raise NonFiniteError(f"{name}: {bad[0]} of batch {i} is not finite; look at that model")
        bar.write(i + 1, {})
        yield rows, {field: array[: len(rows)] for field, array in out.items()}
    bar.close()


def responses_of(
    run: Run,
    stage: cfg.SampleStage | cfg.RedTeamStage,
    policy: str,
    prompts: Examples,
    file: storage.Path,
    key: jax.Array,
    number: int | None = None,
) -> list[list[Response]]:
    """Returns the responses of a policy to each prompt, sampled batch by batch; batches that are done are kept.

    Args:
        run: The run.
        stage: The stage.
        policy: The model.
        prompts: The prompts.
        file: Keeps what is done.
        key: Batch i uses `fold_in(key, i)`.
        number: Responses to each prompt; None: the stage's.
    """
    batches: list[list[tuple[int, list[Response]]]] = kept_batches(file)
    if sum(map(len, batches)) < len(prompts):
        module, variables = run.networks.read(policy, "lm")
        respond = functools.partial(sampler_of(run, stage, module, {}, number), variables["params"], {})
        name = f"{stage.name}: {policy}"
        for rows, out in sampled(run, respond, prompts, stage.batch_size, key, name, host={}, start=len(batches)):
            texts = [
                [text_of(run, ids[:length]) for ids, length in zip(*of_prompt, strict=True)]
                for of_prompt in zip(out["tokens"], out["length"], strict=True)
            ]
            batches.append(list(zip(map(int, rows), texts, strict=True)))
            keep_batch(file, batches[-1])
    found = dict(pair for batch in batches for pair in batch)  # batches are in order of the prompts' lengths
    return [found[row] for row in range(len(prompts))]


def text_of(run: Run, ids: np.ndarray) -> Response:
    """Returns a sampled response as text, and whether it has an end."""
    return {"text": run.tokenizer.decode(ids), "ended": run.has_end(ids)}


def warn_of_truncation(run: Run, stage: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Warns if scorers have read many responses without an end, as no text that they were trained on."""
    share = float(np.mean([sample["truncated"] for sample in samples])) if samples else 0.0
    if share > MANY and stage.scorers and run.end_id is None:
        run.warn(
            stage.name,
            f"{share:.0%} of the responses are cut at max_response_length {stage.max_response_length}; scores of texts "
            "without an end say little where a model was trained on whole ones: raise max_response_length, or set "
            "end_truncated: true, so that scorers read an end after them",
        )


def asked(run: Run, stage: cfg.SampleStage | cfg.RedTeamStage, policy: str, prompts: Sequence[Any]) -> Examples:
    """Returns conversations that a stage asks a policy of itself, as long as its positions allow.

    The record of each has its place among them, `row`; those that are too long are left out.

    Raises:
        DataError: If all are too long.
    """
    return load_prompts(
        [{"prompt": list(turns), "row": row} for row, turns in enumerate(prompts)],
        run.template,
        run.tokenizer,
        max_length=run.networks.config(policy).generated_length - stage.max_response_length,
        where=f"{stage.name}: what {policy} is asked",
        max_bad=1.0,
    )


def scores_of_several(run: Run, host: Mapping[str, HostSignal], prompts: Examples, rows: Any, out: Sampled) -> Sampled:
    """Returns the scores of n responses to each prompt by the signals of the host, f32[B, n] each."""
    shape = out["length"].shape
    tokens, lengths = out["tokens"].reshape(-1, out["tokens"].shape[-1]), out["length"].reshape(-1)
    scores = host_scores(run, host, prompts, np.repeat(rows, shape[1]), tokens, lengths)
    return {signal: values.reshape(shape) for signal, values in scores.items()}


def some_of(prompts: Examples, rows: Sequence[int]) -> Examples:
    """Returns some rows of a dataset."""
    which = np.asarray(rows, np.int64)
    arrays = jax.tree.map(lambda x: x[which], prompts.arrays).replace(row=np.arange(len(which), dtype=np.int32))
    records, turns = [prompts.records[i] for i in rows], tuple(prompts.turns[i] for i in rows)
    return dataclasses.replace(prompts, arrays=arrays, records=records, turns=turns)


def is_limited(stage: cfg.SampledPrompts, prompts: Examples) -> np.ndarray:
    """Returns bool[N]: True if the limit applies to the prompt."""
    groups, field = stage.constrained_groups, str(stage.group_field)
    return np.array([groups is None or str(record[field]) in groups for record in prompts.records], bool)
