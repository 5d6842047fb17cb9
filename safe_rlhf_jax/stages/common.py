"""Shared by stages: the run, batches and evaluation inputs on the mesh, exports, writers."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.demo import oracle_for
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.formats import Record
from safe_rlhf_jax.data.loader import Batches
from safe_rlhf_jax.data.oracles import Oracle
from safe_rlhf_jax.data.sources import mix, read_records
from safe_rlhf_jax.errors import FileError
from safe_rlhf_jax.host_memory import MOST_KEPT, return_freed_memory
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.adapters import Adapted, merged, whole
from safe_rlhf_jax.models.config import Layout
from safe_rlhf_jax.models.peft_export import write_adapter
from safe_rlhf_jax.sharding import (
    fetch,
    make_mesh,
    process_share,
    row_shards,
    shard_batch,
)
from safe_rlhf_jax.stages.encoding import Encoding, exported_template, open_encodings, taught_end
from safe_rlhf_jax.stages.hashing import DIGESTS, Digests, stage_hashes
from safe_rlhf_jax.stages.networks import Weights
from safe_rlhf_jax.types import Params, TrainState

LOGGER = logging.getLogger(__name__)

MADE_DATA = "data.jsonl"  # the records that a stage makes, in its folder
EVAL_BATCH = 128  # rows of an evaluation batch, rounded up to a multiple of the shards


class Run:
    """Shared state of the stages of a run: config, tokenizer, mesh and folders."""

    def __init__(self, config: cfg.RunConfig, config_path: str = "FILE"):
        self.config = config
        self.config_path = config_path
        self.own, encoding = open_encodings(config)
        self.tokenizer, self.template, self.ends = encoding.tokenizer, encoding.template, encoding.ends
        self.tokenizer.hf.chat_template = exported_template(encoding)
        sizes = config.mesh
        self.mesh = make_mesh((sizes.data, sizes.fsdp, sizes.tensor), decode=sizes.decode)
        self.warnings: dict[str, list[str]] = {}  # by stage, reported before it starts
        self.networks = Weights(self)
        self.loaded: dict[tuple[str, ...], Examples] = {}  # by the check, waiting for their stages
        self.unchecked: set[str] = set()  # stages whose data is made by others that are not finished
        texts = [encoding.identity, {name: own.identity for name, own in self.own.items()}]
        self.digests = Digests(storage.path(config.workdir) / DIGESTS)
        self.hashes = stage_hashes(config, texts, self.digests)

    def encoding(self, reference: str) -> Encoding:
        """Returns the encoding of a model's texts: the run's, or its own."""
        return self.own.get(reference) or Encoding(self.tokenizer, self.template)

    def rows(self, data: Examples, most: int = EVAL_BATCH) -> int:
        """Returns the batch size for data that is only read: all rows, up to `most`, in whole shards."""
        shards = row_shards(self.mesh)
        return -(-max(1, min(most, len(data))) // shards) * shards

    def folder(self, name: str) -> storage.Path:
        """Returns the folder of a stage."""
        return storage.path(self.config.workdir) / name

    def result(self, name: str) -> dict[str, Any] | None:
        """Returns `result.json` of a stage finished with the present config, else None."""
        path = self.folder(name) / "result.json"
        result = json.loads(storage.read_text(path)) if storage.is_file(path) else None
        return result if result and result["config_hash"] == self.hashes[name] else None

    def model_folder(self, reference: str) -> str:
        """Returns the folder (or hub id) behind a stage's name, `path:…` or `hf:…`."""
        prefix, _, rest = reference.partition(":")
        return rest if rest and prefix in ("path", "hf") else str(self.folder(reference) / "export")

    def records(self, data: cfg.Mixture) -> list[Record]:
        """Returns the records of a data set, or of all parts of a mixture."""
        return read_mixture(located(self.config, data))

    def oracle(self, data: cfg.Data) -> Oracle | None:
        """Returns the ground truth of a data set; of what a stage makes, that of the prompts that it reads."""
        if data.maker is None:
            return oracle_for(data)
        maker = next(stage for stage in self.config.stages if stage.name == data.maker)
        found = [self.oracle(part) for part in maker.parts()]
        return found[0] if found and None not in found else None

    def has_data(self, stage: cfg.StageBase) -> bool:
        """Says whether all stages whose records a stage reads are finished."""
        return all(self.result(name) is not None for name in stage.makers())

    def has_end(self, ids: np.ndarray | Sequence[int]) -> bool:
        """Says whether the tokens of a response end with one that ends a response."""
        return len(ids) > 0 and int(ids[-1]) in self.ends

    @property
    def end_id(self) -> int | None:
        """The end token that scorers read after a truncated response; None: they read it as it is."""
        return taught_end(self.tokenizer, self.template) if self.config.end_truncated else None

    def warn(self, name: str, text: str) -> None:
        """Warns of a problem of a stage, once; `result.json` keeps the warning."""
        said = self.warnings.setdefault(name, [])
        if text not in said:
            said.append(text)
            LOGGER.warning(f"{name}: warning: {text}")

    def seed(self, stage: Any) -> int:
        """Returns the seed of a stage."""
        return self.config.seed if stage.seed is None else stage.seed

    def batches(
        self,
        data: Examples,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None,
        group_by_length: bool = False,
        packed: int | None = None,
    ) -> Callable[[int], Any]:
        """Returns batch(step) on the mesh; each process reads its own share of the rows. `packed`: microbatches."""
        index, count = process_share(self.mesh)
        batches = Batches(
            data,
            batch_size=batch_size,
            seed=seed,
            weights=weights,
            group_by_length=group_by_length,
            packed=None if packed is None else (row_shards(self.mesh), packed),
            process_index=index,
            process_count=count,
        )
        return lambda step: shard_batch(batches(step), self.mesh, (index, count))

    def put(self, batch: Any) -> Any:
        """Puts a host batch, whole in every process, on the mesh."""
        return_freed_memory(above=MOST_KEPT)
        return shard_batch(batch, self.mesh)

    def get(self, tree: Any) -> Any:
        """Returns arrays of the mesh as host arrays, whole in every process."""
        return fetch(tree)


def located(config: cfg.RunConfig, data: cfg.Mixture) -> tuple[cfg.Data, ...]:
    """Returns the parts of a mixture; those that stages of the run make, as their files, split as they are made."""
    folder, makers = storage.path(config.workdir), {stage.name: stage for stage in config.stages}
    found = []
    for part in cfg.parts_of(data):
        if part.maker is not None:
            share = part.test_share or makers[part.maker].made_test_share
            part = part.found_in(folder / part.maker / MADE_DATA).model_copy(update={"test_share": share})
        found.append(part)
    return tuple(found)


def read_mixture(data: cfg.Mixture) -> list[Record]:
    """Returns the records of a data set, or of all parts of a mixture."""
    parts = [read_records(**part.model_dump(exclude={"weight"})) for part in cfg.parts_of(data)]
    return mix(parts) if len(parts) > 1 else parts[0]


def described(data: cfg.Mixture) -> str:
    """Describes a data set, or the parts of a mixture."""
    return "data " + " + ".join(f"{part.name} ({part.split})" for part in cfg.parts_of(data))


def weights(data: cfg.Mixture) -> list[float] | None:
    """Returns the weights of a mixture, or None if its parts are weighted by their records."""
    given = [part.weight for part in cfg.parts_of(data)]
    return [weight for weight in given if weight is not None] if len(given) > 1 and None not in given else None


def read_length(run: Run, reference: str, length: int) -> int:
    """Returns a scorer's maximum text length: `length` in the run's tokens; the model's maximum in its own."""
    return run.networks.config(reference).max_positions if reference in run.own else length


def export(
    run: Run, stage: cfg.TrainingStage, folder: storage.Path, module: Any, state: TrainState,
    base: Params | None = None, layout: Layout | None = None,
) -> None:  # fmt: skip
    """Writes `export/`, a Hugging Face folder of the network and the tokenizer, and `adapter/` of one with adapters.

    Args:
        run: The run.
        stage: The stage, whose `lora.export` says what `export/` is.
        folder: Of the stage.
        module: The network.
        state: Its state.
        base: Of a network with adapters.
        layout: Of a score model.
    """
    variables = {"params": whole(state.params, base)} | ({"stats": state.stats} if state.stats else {})
    if isinstance(module, Adapted):
        save_adapter(run, stage.init_from, folder / "adapter", module, variables)
    if stage.lora is not None and stage.lora.export == "peft":
        save_adapter(run, stage.init_from, folder / "export", module, variables)
    else:
        save_merged(run, folder / "export", module, variables, layout)


def save_merged(
    run: Run, folder: storage.Path, module: Any, variables: dict[str, Any], layout: Layout | None = None
) -> None:
    """Writes a Hugging Face folder of a network, of one with adapters merged."""
    module, params = merged(module, variables["params"], lazily=True)
    with export_errors(folder):
        hf.save(folder, module, variables | {"params": params}, run.tokenizer.hf, layout=layout, ends=run.ends)


def save_adapter(run: Run, start: str, folder: storage.Path, module: Adapted, variables: dict[str, Any]) -> None:
    """Writes a PEFT folder of the adapter of a network, which starts from a model."""
    base, lora = run.networks.origin(start)[0], module.config.lora
    assert lora is not None
    where = run.model_folder(base)
    with export_errors(folder):
        write_adapter(
            folder,
            module.config,
            lora,
            variables["params"]["adapter"],
            score=getattr(module.module, "score", None),
            head=variables["params"].get("head"),
            stats=variables.get("stats"),
            base=where if base.startswith("hf:") else str(storage.absolute(where)),
            tokenizer=run.tokenizer.hf,
            ends=run.ends,
        )


@contextlib.contextmanager
def export_errors(folder: storage.Path) -> Iterator[None]:
    """Turns system errors of a file that cannot be written into one clear error that names it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # reported so by `tokenizers`
            raise
        written = sorted(storage.matching(folder, "*"), key=lambda path: storage.status(path).modified)
        where = getattr(error, "filename", None) or (written[-1] if written else folder)
        reason = getattr(error, "strerror", None) or error
        raise FileError(
            f"{where} could not be written: {reason}. Make room if the disk is full, then run the same command again"
        ) from error


def report_data(name: str, data: Examples) -> None:
    """Reports the records left out of a dataset."""
    notes = [f"{count} skipped: {reason}" for reason, count in data.skipped.items()]
    notes += [f"{count} left out: {reason}" for reason, count in data.left_out.items()]
    apart = f"{data.apart} texts whose prompt and response would share a token: tokenised apart"
    notes += [apart] if data.apart else []
    notes += [f"{data.truncated} texts cut to the length limit"] if data.truncated else []
    LOGGER.info(f"{name}: {len(data)} records" + "".join(f"; {note}" for note in notes))


def writers(run: Run) -> tuple[str, ...]:
    """Returns the writers of metrics."""
    return ("jsonl", "tensorboard", "wandb") if run.config.wandb else ("jsonl", "tensorboard")


def profiled(stage: cfg.TrainingStage) -> range:
    """Returns the steps of which a profile is written."""
    return range(0) if stage.profile is None else stage.profile.numbers


def flat(evaluation: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of an evaluation under their metric names."""
    return {f"eval/{name}": value for name, value in evaluation.get("metrics", {}).items()}
