"""What stages share: the run, opening networks, making states, compiling steps, exporting."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.sources import Record, read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import PRESETS, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import init_state, make_optimizer, schedule
from safe_rlhf_jax.sharding import init_sharded, make_mesh, named_shardings, replicated, shard_batch
from safe_rlhf_jax.types import TrainState

EVAL_BATCH = 128  # rows of a batch that is only read, rounded up to what the mesh divides


class Run:
    """What the stages of a run share: config, tokenizer, mesh and folders."""

    def __init__(self, config: cfg.RunConfig, config_path: str = "FILE"):
        self.config = config
        self.config_path = config_path
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self.template = TEMPLATES[config.template]
        self.mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
        self.hashes: dict[str, str] = {}
        shared = [config.seed, config.tokenizer, config.template, config.execution, config.mesh]
        for stage in config.stages:
            upstream = [self.hashes.get(name, name) for name in cfg.references(stage).values()]
            self.hashes[stage.name] = cfg.config_hash(stage, *shared, file_digests(stage), *upstream)

    @property
    def eval_batch(self) -> int:
        """Rows of a batch that is only read."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-EVAL_BATCH // shards) * shards

    def folder(self, name: str) -> pathlib.Path:
        """Returns the folder of a stage."""
        return pathlib.Path(self.config.workdir) / name

    def result(self, name: str) -> dict[str, Any] | None:
        """Returns `result.json` of a stage that is finished with the present config, else None."""
        path = self.folder(name) / "result.json"
        result = json.loads(path.read_text()) if path.is_file() else None
        return result if result and result["config_hash"] == self.hashes[name] else None

    def model_folder(self, reference: str) -> str:
        """Returns the folder (or hub id) behind a stage's name, `path:…` or `hf:…`."""
        prefix, _, rest = reference.partition(":")
        return rest if rest and prefix in ("path", "hf") else str(self.folder(reference) / "export")

    def records(self, data: cfg.Data) -> list[Record]:
        """Returns the records of a dataset."""
        return read_records(data.name, data.split, data.limit)

    def seed(self, stage: Any) -> int:
        """Returns the seed of a stage."""
        return self.config.seed if stage.seed is None else stage.seed

    def put(self, batch: Any) -> Any:
        """Puts a host batch on the mesh."""
        return shard_batch(batch, self.mesh)


def file_digests(stage: Any) -> dict[str, str]:
    """Returns {path: digest} of the local files a stage reads: other contents are another run."""
    pending, digests = list(stage), {}
    while pending:
        _, value = pending.pop()
        if isinstance(value, cfg.Data) and pathlib.Path(value.name).expanduser().is_file():
            with pathlib.Path(value.name).expanduser().open("rb") as file:
                digests[value.name] = hashlib.file_digest(file, "sha256").hexdigest()
        elif isinstance(value, cfg.Schema):
            pending.extend(value)
        elif isinstance(value, tuple):
            pending.extend(("", item) for item in value)
    return digests


def new_config(run: Run, preset: str) -> ModelConfig:
    """Returns the configuration of a preset for the run's tokenizer."""
    sizes: dict[str, Any] = dict(PRESETS[preset])
    return with_execution(run, ModelConfig(vocab_size=run.tokenizer.vocab_size, **sizes))


def with_execution(run: Run, config: ModelConfig) -> ModelConfig:
    """Returns a model's configuration with the run's way of running it."""
    execution = run.config.execution
    return dataclasses.replace(config, dtype=execution.dtype, remat=execution.remat, scan_layers=execution.scan_layers)


def open_model(
    run: Run, reference: str, head: Literal["lm", "score"], *, score: ScoreConfig | None = None,
    score_type: ScoreType | None = None, seed: int = 0,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Returns a network and its variables, in their shards, from a preset, a folder, a hub id or an earlier stage.

    Args:
        run: The run.
        reference: As in `init_from`.
        head: Which head.
        score: How the scores of a model that is to be trained are normalised; by default as stored.
        score_type: Reads the scores as those of another kind (a reward model as a critic).
        seed: Of random initialisation.
    """
    prefix, _, rest = reference.partition(":")
    if prefix == "preset":
        config = new_config(run, rest)
        score = score or ScoreConfig(score_type or "reward")
        module: Any = CausalLM(config) if head == "lm" else ScoreModel(config, score)
        variables = init_sharded(initializer(module), run.mesh, jax.random.key(seed))
        return module, variables
    module, variables = hf.load(
        run.model_folder(reference),
        head,
        score_type=score.score_type if score else score_type,
        scan_layers=run.config.execution.scan_layers,
        seed=seed,
    )
    module = module.clone(config=with_execution(run, module.config))
    if score is not None:
        module = module.clone(score=dataclasses.replace(score, bias=module.score.bias))
    shardings = named_shardings(jax.eval_shape(initializer(module), jax.random.key(0)), run.mesh)
    return module, jax.device_put(variables, shardings)


def initializer(module: Any) -> Callable[[jax.Array], Any]:
    """Returns init(key) -> variables with axis boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: module.init(key, tokens, tokens == 0)


def start_state(
    run: Run, module: Any, variables: dict[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state of a network before its first step; optimizer moments are sharded like the parameters."""

    def boxed(key: jax.Array) -> TrainState:
        v = initializer(module)(key)
        return init_state(v["params"], optimizer, v.get("stats", {}))

    shardings = named_shardings(jax.eval_shape(boxed, jax.random.key(0)), run.mesh)
    init = jax.jit(lambda v: init_state(v["params"], optimizer, v.get("stats", {})), out_shardings=shardings)
    state: TrainState = init(nn.unbox(variables))
    return state


def jit_step(step: Callable[..., Any], state: Any, mesh: Any) -> Callable[..., Any]:
    """Compiles a step with the state donated and its shardings pinned, so that the second call does not recompile."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def optimizer_of(config: cfg.OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a config."""
    rate = schedule(config.schedule, lr=config.lr, warmup_ratio=config.warmup_ratio, total_steps=total_steps)
    return make_optimizer(
        rate, weight_decay=config.weight_decay, b1=config.b1, b2=config.b2, eps=config.eps,
        max_grad_norm=config.max_grad_norm,
    )  # fmt: skip


def export(run: Run, folder: pathlib.Path, module: Any, state: TrainState) -> None:
    """Writes `export/`, a Hugging Face folder of the network and the tokenizer."""
    variables = {"params": state.params} | ({"stats": state.stats} if state.stats else {})
    hf.save(folder / "export", module, variables, run.tokenizer.hf)


def oracle_for(data: cfg.Data) -> Callable[[str, str], dict[str, Any]] | None:
    """Returns the ground truth of the embedded world for its own prompts, None for any other data."""
    if not data.name.startswith("demo/"):
        return None

    def oracle(prompt: str, response: str) -> dict[str, Any]:
        harm = demo.harm(response, prompt)
        return {
            "helpfulness": demo.helpfulness(prompt, response),
            "harmful": harm.is_harmful,
            "severity": harm.severity,
            "refusal": demo.is_refusal(response),
        }

    return oracle


def report_data(name: str, data: Examples) -> None:
    """Says what was left out of a dataset."""
    notes = [f"{count} skipped: {reason}" for reason, count in data.skipped.items()]
    notes += [f"{data.truncated} texts cut to the length limit"] if data.truncated else []
    print(f"{name}: {len(data)} records" + "".join(f"; {note}" for note in notes))


def writers(run: Run) -> tuple[str, ...]:
    """Returns where metrics go."""
    return ("jsonl", "tensorboard", "wandb") if run.config.wandb else ("jsonl", "tensorboard")


def flat(evaluation: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of an evaluation under their metric names."""
    return {f"eval/{name}": value for name, value in evaluation.get("metrics", {}).items()}
