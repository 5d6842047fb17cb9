"""Data sets of a stage as examples, read as specified by `DataUse`."""

from collections.abc import Callable
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.stages.common import Run, described

Load = Callable[[Run, Any, str], Examples]  # (run, stage, field of `datasets()`)


def load_data(run: Run, stage: cfg.StageBase, field: str) -> Examples:
    """Returns the examples of a data set, in the run's template."""
    return load_records(run, stage, field, run.records(stage.datasets()[field].data))


def load_records(run: Run, stage: cfg.StageBase, field: str, records: Any) -> Examples:
    """Returns the examples of given records of a data set."""
    use: cfg.DataUse = stage.datasets()[field]
    shared: dict[str, Any] = {
        "max_length": use.max_length,
        "where": f"{stage.name}: {described(use.data)}",
        "max_bad": run.config.max_bad_records,
    }
    if use.reads == "sft":
        return examples.load_supervised(records, run.template, run.tokenizer, **shared)
    if use.reads != "prompts":
        if isinstance(stage, cfg.PreferenceStage) and use.role == "train":
            shared |= {"shares": stage.labels == "shares", "weight_field": stage.weight_field}
        return examples.load_pairs(records, run.template, run.tokenizer, safety=use.reads == "cost", **shared)
    # A prompt that a scorer cannot read in its own encoding is unusable; in training no judge is asked.
    readers = [model for model in stage.models().values() if not (model.judge and use.role == "train")]
    models = dict.fromkeys(model.reference for model in readers)
    own = {model: run.own[model] for model in models if model in run.own}
    return examples.load_prompts(
        records,
        run.template,
        run.tokenizer,
        long_prompts=getattr(stage, "long_prompts", "drop"),
        group_field=getattr(stage, "group_field", None),
        readers={model: (encoding.template, encoding.tokenizer) for model, encoding in own.items()},
        **shared,
    )


def keep(run: Run, stage: cfg.StageBase, field: str, load: Load = load_data) -> Examples:
    """Loads a data set before the first stage runs, so that its errors are raised early."""
    run.loaded[stage.name, field] = load(run, stage, field)
    return run.loaded[stage.name, field]


def take(run: Run, stage: cfg.StageBase, field: str, load: Load = load_data) -> Examples:
    """Pops a cached data set; loads it if it is not cached."""
    kept = run.loaded.pop((stage.name, field), None)
    return load(run, stage, field) if kept is None else kept
