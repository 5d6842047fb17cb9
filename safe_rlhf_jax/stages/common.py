"""What stages share: the run, opening networks, making states, compiling steps, exporting."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.demo import oracle_for as oracle_for
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import Record
from safe_rlhf_jax.data.loader import Batches
from safe_rlhf_jax.data.sources import mix, read_records
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import PRESETS, Layout, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import init_state, make_optimizer, multiplied, schedule
from safe_rlhf_jax.sharding import (
    fetch,
    init_sharded,
    make_mesh,
    named_shardings,
    process_share,
    replicated,
    shard_batch,
    with_shardings,
)
from safe_rlhf_jax.stages.encoding import Encoding, exported_template, open_encodings
from safe_rlhf_jax.stages.hashing import DIGESTS, Digests, stage_hashes
from safe_rlhf_jax.types import TrainState

EVAL_BATCH = 128  # rows of a batch that is only read, rounded up to what the mesh divides


class Run:
    """What the stages of a run share: config, tokenizer, mesh and folders."""

    abstract = False  # True in a run that is only compiled: its arrays are shapes with shardings

    def __init__(self, config: cfg.RunConfig, config_path: str = "FILE"):
        self.config = config
        self.config_path = config_path
        self.own, encoding = open_encodings(config)
        self.tokenizer, self.template, self.ends = encoding.tokenizer, encoding.template, encoding.ends
        self.tokenizer.hf.chat_template = exported_template(encoding)
        self.mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
        self.warnings: dict[str, list[str]] = {}  # by stage, said before it starts
        self.loaded: dict[tuple[str, ...], Examples] = {}  # by the check, waiting for their stages
        texts = [encoding.identity, {name: own.identity for name, own in self.own.items()}]
        self.digests = Digests(pathlib.Path(config.workdir) / DIGESTS)
        self.hashes = stage_hashes(config, texts, self.digests)

    def encoding(self, reference: str) -> Encoding:
        """Returns how a model reads its texts: as the run does, or as it does itself."""
        return self.own.get(reference) or Encoding(self.tokenizer, self.template)

    @property
    def eval_batch(self) -> int:
        """Rows of a batch that is only read."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-EVAL_BATCH // shards) * shards

    def rows(self, data: Examples, most: int = EVAL_BATCH) -> int:
        """Returns the rows of a batch of data that is only read: all there are, up to `most`, in whole shards."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-max(1, min(most, len(data))) // shards) * shards

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

    def records(self, data: cfg.Mixture) -> list[Record]:
        """Returns the records of a data set, or of all parts of a mixture."""
        return read_mixture(data)

    def warn(self, name: str, text: str) -> None:
        """Says what speaks against a stage, once; `result.json` keeps it."""
        said = self.warnings.setdefault(name, [])
        if text not in said:
            said.append(text)
            print(f"{name}: warning: {text}")

    def seed(self, stage: Any) -> int:
        """Returns the seed of a stage."""
        return self.config.seed if stage.seed is None else stage.seed

    def batches(
        self, data: Examples, batch_size: int, seed: int, weights: Sequence[float] | None
    ) -> Callable[[int], Any]:
        """Returns batch(step) on the mesh; each process reads its own share of the rows."""
        index, count = process_share(self.mesh)
        batches = Batches(
            data, batch_size=batch_size, seed=seed, weights=weights, process_index=index, process_count=count
        )
        return lambda step: shard_batch(batches(step), self.mesh, (index, count))

    def put(self, batch: Any) -> Any:
        """Puts a host batch, whole in every process, on the mesh."""
        return shard_batch(batch, self.mesh)

    def get(self, tree: Any) -> Any:
        """Returns arrays of the mesh as host arrays, whole in every process."""
        return fetch(tree)


def read_mixture(data: cfg.Mixture) -> list[Record]:
    """Returns the records of a data set, or of all parts of a mixture."""
    parts = [read_records(**part.model_dump(exclude={"weight"})) for part in cfg.parts_of(data)]
    return mix(parts) if len(parts) > 1 else parts[0]


def handed_on(load: Callable[..., Examples]) -> Callable[..., Examples]:
    """Makes load(run, stage, data, …) keep what the check loads until the stage asks for it, and then forget it."""

    @functools.wraps(load)
    def once(run: Run, stage: Any, data: cfg.Mixture, *more: str) -> Examples:
        key = load.__name__, stage.name, repr(data), *more
        if key in run.loaded:
            return run.loaded.pop(key)
        run.loaded[key] = load(run, stage, data, *more)
        return run.loaded[key]

    return once


def described(data: cfg.Mixture) -> str:
    """Returns a data set, or the parts of a mixture, in words."""
    return "data " + " + ".join(f"{part.name} ({part.split})" for part in cfg.parts_of(data))


def weights(data: cfg.Mixture) -> list[float] | None:
    """Returns the weights of a mixture, or None where its parts count by their records."""
    given = [part.weight for part in cfg.parts_of(data)]
    return [weight for weight in given if weight is not None] if len(given) > 1 and None not in given else None


def new_config(run: Run, preset: str) -> ModelConfig:
    """Returns the configuration of a preset for the run's tokenizer."""
    sizes: dict[str, Any] = {"vocab_size": run.tokenizer.vocab_size} | PRESETS[preset]
    return with_execution(run, ModelConfig(**sizes))


def with_execution(run: Run, config: ModelConfig) -> ModelConfig:
    """Returns a model's configuration with the run's way of running it, and without tokens that it does not have."""
    execution, unused = run.config.execution, run.tokenizer.holes(config.vocab_size)
    return dataclasses.replace(config, **execution.model_dump(), unused_rows=unused)


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

    Raises:
        ValueError: If scores are to be used as they are, and the folder holds no head or scores of another kind.
    """
    if reference.startswith("preset:") or run.abstract:
        config = with_execution(run, model_config(run, reference))
        score = score or ScoreConfig(score_type or "reward")
        module: Any = CausalLM(config) if head == "lm" else ScoreModel(config, score)
        if run.abstract:
            boxed = jax.eval_shape(lambda: initializer(module)(jax.random.key(0)))
            return module, with_shardings(nn.unbox(boxed), named_shardings(boxed, run.mesh))
        variables = init_sharded(initializer(module), run.mesh, jax.random.key(seed))
        return module, variables
    module, variables = hf.load(
        run.model_folder(reference),
        head,
        score_type=score.score_type if score else score_type,
        score_bias=score.bias if score else None,
        as_stored=head == "score" and score is None and score_type != "critic",
        scan_layers=run.config.execution.scan_layers,
        seed=seed,
        mesh=run.mesh,
    )
    module = module.clone(config=with_execution(run, module.config))
    if score is not None:
        module = module.clone(score=dataclasses.replace(score, bias=module.score.bias))
    return module, variables


def model_config(run: Run, reference: str) -> ModelConfig:
    """Returns the configuration of a model, also of one that an earlier stage has yet to make."""
    prefix, _, rest = reference.partition(":")
    if rest and prefix == "preset":
        return new_config(run, rest)
    for stage in run.config.stages:
        if stage.name == reference and isinstance(stage, cfg.TrainingStage | cfg.MergeStage):
            return model_config(run, stage.init_from)
    folder = run.model_folder(reference)
    if run.abstract and run.config.assume and not pathlib.Path(folder).expanduser().is_dir():
        return new_config(run, run.config.assume)
    return hf.stored_config(hf.resolve(folder))


def read_length(run: Run, reference: str, length: int) -> int:
    """Returns the tokens that a scorer reads of a text: `length` of the run's; of its own as many as it can."""
    return model_config(run, reference).max_positions if reference in run.own else length


def initializer(module: Any) -> Callable[[jax.Array], Any]:
    """Returns init(key) -> variables with axis boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: module.init(key, tokens, tokens == 0)


def start_state(
    run: Run, module: Any, variables: dict[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state of a network before its first step; optimizer moments are sharded like the parameters."""

    def boxed(key: jax.Array) -> TrainState:
        return init(initializer(module)(key))

    def init(v: Any) -> TrainState:
        return init_state(v["params"], optimizer, v.get("stats", {}))

    shapes = jax.eval_shape(lambda: boxed(jax.random.key(0)))
    shardings = named_shardings(shapes, run.mesh)
    if run.abstract:
        abstract: TrainState = with_shardings(nn.unbox(shapes), shardings)
        return abstract
    state: TrainState = jax.jit(init, out_shardings=shardings)(nn.unbox(variables))
    return state


def replicate(run: Run, make: Callable[[], Any]) -> Any:
    """Returns `make()`, whole on every device."""
    sharding = replicated(run.mesh)
    if run.abstract:
        shapes = jax.eval_shape(make)
        return with_shardings(shapes, jax.tree.map(lambda _: sharding, shapes))
    return jax.device_put(make(), sharding)


def only_read(run: Run, params: Any) -> Any:
    """Returns parameters that no step changes, matrices in the dtype that they are multiplied in."""

    def cast(tree: Any) -> Any:
        return multiplied(tree, run.config.execution.dtype)

    if run.abstract:
        return with_shardings(jax.eval_shape(cast, params), jax.tree.map(lambda x: x.sharding, params))
    return cast(params)


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


def export(run: Run, folder: pathlib.Path, module: Any, state: TrainState, layout: Layout | None = None) -> None:
    """Writes `export/`, a Hugging Face folder of the network and the tokenizer; `layout` is that of a score model."""
    variables = {"params": state.params} | ({"stats": state.stats} if state.stats else {})
    with export_errors(folder / "export"):
        hf.save(folder / "export", module, variables, run.tokenizer.hf, layout=layout, ends=run.ends)


@contextlib.contextmanager
def export_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be written into one clear error that names it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # as `tokenizers` reports one
            raise
        written = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime_ns)
        where = getattr(error, "filename", None) or (written[-1] if written else folder)
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{where} could not be written: {reason}. Make room if the disk is full, then run the same command again"
        ) from error


def report_data(name: str, data: Examples) -> None:
    """Says what was left out of a dataset."""
    notes = [f"{count} skipped: {reason}" for reason, count in data.skipped.items()]
    notes += [f"{count} left out: {reason}" for reason, count in data.left_out.items()]
    apart = f"{data.apart} texts whose prompt and response would share a token: tokenised apart"
    notes += [apart] if data.apart else []
    notes += [f"{data.truncated} texts cut to the length limit"] if data.truncated else []
    print(f"{name}: {len(data)} records" + "".join(f"; {note}" for note in notes))


def writers(run: Run) -> tuple[str, ...]:
    """Returns where metrics go."""
    return ("jsonl", "tensorboard", "wandb") if run.config.wandb else ("jsonl", "tensorboard")


def flat(evaluation: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of an evaluation under their metric names."""
    return {f"eval/{name}": value for name, value in evaluation.get("metrics", {}).items()}
