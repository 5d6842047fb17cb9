"""PEFT folders in: LoRA adapters of language models (CAUSAL_LM) and of reward and cost models (SEQ_CLS).

A folder holds `adapter_config.json` and `adapter_model.safetensors`: for each adapted linear map W [out, in] of the
base `lora_A` [r, in] and `lora_B` [out, r], and of a score model the head (`peft_heads`). The adapted map is W + s·B·A.
Source: https://github.com/huggingface/peft.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import MissingModelError, ModelError
from safe_rlhf_jax.models.config import TARGETS, Lora, ModelConfig
from safe_rlhf_jax.models.families.record import module_path
from safe_rlhf_jax.models.folders import ADAPTER, ADAPTER_WEIGHTS, MERGE, is_adapter, read_json, resolve
from safe_rlhf_jax.models.matching import FLOATS, listed, weight_map
from safe_rlhf_jax.models.parameters import abstract_variables
from safe_rlhf_jax.models.peft_config import check_fields, scale_of, targeted
from safe_rlhf_jax.models.safetensors_io import Tensors
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.models.weights import Path, Shape, Weight, from_stored, linear_shape

PREFIX = "base_model.model."  # of tensors
SCORES = ("score.", "score_head.", "normalizer.")  # tensors of a score head, in either layout
ANOTHER = "this is a PEFT folder of another base, or one that was cut off"

Index = tuple[slice, ...]


# --- The base's linear maps -------------------------------------------------------------------------------------------


@functools.cache
def linear_maps(config: ModelConfig) -> dict[str, Weight]:
    """Returns {stored module: Weight} of the linear maps in all layers, each with its layer and a scanned path."""
    config = dataclasses.replace(config, scan_layers=True, trunk=0, lora=None)
    weights = weight_map(config, None).items()
    return {
        name.removesuffix(".weight"): weight for name, weight in weights if weight.layer is not None and weight.in_ndim
    }


def kind(module: str) -> str:
    """Returns the name of a stored module within its layer."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[1]


@functools.cache
def kernel_shapes(config: ModelConfig) -> dict[Path, Shape]:
    """Returns the shapes of the parameters of `linear_maps`, without the layer axis."""
    config = dataclasses.replace(config, scan_layers=True, trunk=0, lora=None)
    params = flatten_dict(abstract_variables(CausalLM(config))["params"])
    paths = {path for weight in linear_maps(config).values() for path in weight.paths}
    return {path: params[path].shape[1:] for path in paths}


# --- Folders ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """A PEFT folder whose `adapter_config.json` is checked; its tensors have not been read."""

    folder: storage.Path
    fields: Mapping[str, Any]  # adapter_config.json
    tensors: Tensors  # names without `PREFIX`

    @property
    def base(self) -> str:
        """Folder or hub id of the base, as written."""
        return str(self.fields["base_model_name_or_path"])

    @property
    def scores(self) -> bool:
        """Whether this is a reward or cost model (SEQ_CLS), with a score head."""
        return "score.weight" in self.tensors.entries

    def base_folder(self) -> storage.Path:
        """Returns the folder of the base.

        Raises:
            MissingModelError: If there is none.
            ModelError: If it is an adapter too.
        """
        where = f"{self.folder / ADAPTER}: base_model_name_or_path"
        try:
            folder = resolve(self.base)
        except MissingModelError as error:
            raise MissingModelError(f"{where} {error}") from error
        if is_adapter(folder):
            raise ModelError(f"{where} {self.base!r} is a PEFT adapter too; {MERGE}, and name that")
        return folder

    def adapted(self, config: ModelConfig) -> dict[str, Weight]:
        """Returns {stored module: Weight} of the adapted linear maps.

        Args:
            config: Of the base.

        Raises:
            ModelError: If names or shapes of the tensors are not those that base and `adapter_config.json` ask for.
        """
        maps, shapes, file = linear_maps(config), kernel_shapes(config), self.folder / ADAPTER_WEIGHTS
        found: dict[str, set[str]] = {}
        for name in self.tensors.entries:
            module, _, part = name.rpartition(".lora_")
            if self.scores and name.startswith(SCORES):
                continue
            if module not in maps or part not in ("A.weight", "B.weight"):
                kinds = listed(set(map(kind, maps)), len(TARGETS))
                raise ModelError(
                    f"{file}: tensor {PREFIX + name!r} has no place: LoRA is read on {kinds} of the "
                    f"{config.num_layers} layers of {self.base!r}; {ANOTHER}, or {MERGE}"
                )
            found.setdefault(module, set()).add(part)
        named = {module for module in maps if targeted(self.fields, module, maps[module].layer)}
        if lacking := [module for module in named if len(found.get(module, ())) < 2]:
            raise ModelError(
                f"{file}: no lora_A and lora_B of {listed(lacking)} in {self.base!r}, which {ADAPTER} names; {ANOTHER}"
            )
        if ignored := found.keys() - named:
            raise ModelError(f"{file}: tensors of {listed(ignored)}, which {ADAPTER} does not name: peft ignores them")
        for module in found:
            rank, weight = scale_of(self.fields, module)[0], maps[module]
            rows = [linear_shape(shapes[path], weight.in_ndim or 0) for path in weight.paths]
            for part, shape in (("A", (rank, rows[0][1])), ("B", (sum(row[0] for row in rows), rank))):
                entry = self.tensors.entries[f"{module}.lora_{part}.weight"]
                if entry.shape != shape or entry.dtype not in FLOATS:
                    raise ModelError(
                        f"{file}: tensor '{PREFIX}{module}.lora_{part}.weight' is {entry.dtype} {list(entry.shape)}; "
                        f"base {self.base!r} and rank {rank} ask for {list(shape)}: {ANOTHER}"
                    )
        return {module: weight for module, weight in maps.items() if module in found}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32.

        Raises:
            ModelError: If a number is not finite.
        """
        array = self.tensors[name].astype(np.float32)
        if not np.isfinite(array).all():
            raise ModelError(
                f"{self.folder / ADAPTER_WEIGHTS}: tensor {PREFIX + name!r} holds a number that is not finite"
            )
        return array

    def factors(
        self, module: str, weight: Weight, shapes: Mapping[Path, Shape]
    ) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
        """Returns A f32[*in, r] and B f32[r, *out] of each parameter in a linear map.

        Args:
            module: Its stored name.
            weight: Its parameters.
            shapes: Of those, without the layer axis.
        """
        a, b = (self.read(f"{module}.lora_{part}.weight") for part in "AB")
        ins, rank = weight.in_ndim or 0, len(a)
        outs = {path: (rank, *shapes[path][ins:]) for path in weight.paths}
        parts = from_stored(b, outs, Weight(weight.paths, in_ndim=1, fusion=weight.fusion))
        return {path: (a.T.reshape(*shapes[path][:ins], rank), parts[path]) for path in weight.paths}

    def product(
        self, module: str, weight: Weight, shapes: Mapping[Path, Shape], path: Path, index: Index
    ) -> np.ndarray:
        """Returns a part of s·A·B, in the shape of a parameter in a linear map; arguments as in `factors`."""
        a, b = self.factors(module, weight, shapes)[path]
        ins, scale = weight.in_ndim or 0, np.float32(scale_of(self.fields, module)[1])
        product: np.ndarray = np.tensordot(a[index[:ins]], scale * b[(slice(None), *index[ins:])], 1)
        return product

    # --- Into the form that is trained ---

    def pieces(self, config: ModelConfig, targets: Sequence[str] = ()) -> Iterator[tuple[Path, int, "Piece"]]:
        """Yields path, layer, and factors of each adapted parameter: those of a fused tensor are separated.

        Of a fused tensor only parameters in `targets`, and those that are not adapted by zero, have factors; if there
        are none, all of them.
        """
        shapes = kernel_shapes(config)
        read = {module: self.factors(module, weight, shapes) for module, weight in self.adapted(config).items()}
        wanted = {path for parts in read.values() for path, (_, b) in parts.items() if path[-2] in targets or b.any()}
        for module, parts in read.items():
            active = [path for path in parts if path in wanted] or list(parts)
            for path, columns in separated(parts, active, self.fields["r"]).items():
                a, b = parts[path]
                layer = linear_maps(config)[module].layer
                assert layer is not None
                yield path, layer, Piece(module, a[..., columns], b[columns], scale_of(self.fields, module)[1])

    def form(self, config: ModelConfig) -> Lora:
        """Returns the smallest form that holds this adapter: its largest rank, its targets, the last k layers.

        Args:
            config: Of the base.

        Raises:
            ModelError: As `adapted`, or if the adapted layers are not the last k.
        """
        found = list(self.pieces(config))
        layers = {layer for _, layer, _ in found}
        first = min(layers)
        if layers != set(range(first, config.num_layers)):
            raise ModelError(
                f"{self.folder / ADAPTER}: layers {sorted(layers)} of {config.num_layers} have adapters; training "
                f"takes adapters on all layers, or the last k of them; to start from this one, {MERGE}"
            )
        return Lora(
            rank=max(len(piece.b) for _, _, piece in found),
            alpha=float(self.fields["lora_alpha"]),
            targets=tuple(name for name in TARGETS if any(path[-2] == name for path, _, _ in found)),
            layers=None if first == 0 else config.num_layers - first,
            dropout=float(self.fields.get("lora_dropout") or 0.0),
            rank_stabilized=bool(self.fields.get("use_rslora")),
        )

    def params(self, config: ModelConfig, form: Lora, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns the adapter as a tree of `lora_a` f32[k, *in, r] and `lora_b` f32[k, r, *out] in a form.

        What the form has beyond the folder is zero in B; other scales than the form's are in `lora_b`.

        Args:
            config: Of the base; unrolled layers have leaves of their own, without the axis k.
            form: At least as large as `form(config)`.
            start: A fresh tree of the form, for an adapter that is trained further: its A stands where the folder has
                none. Where A and B are both zero, as without it, no gradient ever reaches them.

        Raises:
            ModelError: As `adapted`, or if the form is too small; names the setting.
        """
        size = form.layers or config.num_layers
        shapes = {path: shape for path, shape in kernel_shapes(config).items() if path[-2] in form.targets}
        ins = {path: weight.in_ndim for weight in linear_maps(config).values() for path in weight.paths}
        out = {path: (np.full((size, *shape[: ins[path]], form.rank), np.nan, np.float32),  # NaN: not in the folder
                      np.zeros((size, form.rank, *shape[ins[path] :]), np.float32))
               for path, shape in shapes.items()}  # fmt: skip
        for path, layer, piece in self.pieces(config, form.targets):
            rank, row = len(piece.b), layer - (config.num_layers - size)
            for fits, what in (
                (path in out, f"targets: {path[-2]!r} is adapted"),
                (row >= 0, f"layers: layer {layer} of {config.num_layers} is adapted, not one of the last {size}"),
                (rank <= form.rank, f"rank: {form.rank} is less than its {rank}"),
            ):
                if not fits:
                    raise ModelError(
                        f"{self.folder}: {piece.module!r} does not fit into lora.{what}; set it so, or {MERGE}"
                    )
            out[path][0][row, ..., :rank] = piece.a
            out[path][1][row, :rank] = piece.b * np.float32(piece.scale / form.scale)
        leaves = dict(in_layers(config, out))
        fresh = flatten_dict(start) if start is not None else dict.fromkeys(leaves, np.float32(0))
        return unflatten_dict({name: np.where(np.isnan(leaf), fresh[name], leaf) for name, leaf in leaves.items()})


@dataclasses.dataclass(frozen=True)
class Piece:
    """The factors of one parameter in one layer."""

    module: str  # stored
    a: np.ndarray  # f32[*in, r]
    b: np.ndarray  # f32[r, *out]
    scale: float


def separated(
    parts: Mapping[Path, tuple[np.ndarray, np.ndarray]], active: Sequence[Path], rank: int
) -> dict[Path, slice]:
    """Returns the columns of A that belong to each of the active parameters in a fused tensor.

    n parameters with an A of their own, of the usual rank r, are stored as one A of rank n·r and a block diagonal B.
    """
    if len(active) > 1 and len(parts[active[0]][1]) == len(active) * rank:
        blocks = {path: slice(i * rank, (i + 1) * rank) for i, path in enumerate(active)}
        if not any(np.delete(parts[path][1], columns, axis=0).any() for path, columns in blocks.items()):
            return blocks
    return dict.fromkeys(active, slice(None))


def in_layers(config: ModelConfig, arrays: Mapping[Path, tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[Path, Any]]:
    """Yields path and array of the leaves of an adapter, from A and B of the last k layers by scanned path."""
    for path, pair in arrays.items():
        for name, array in zip(("lora_a", "lora_b"), pair, strict=True):
            if config.scan_layers:
                yield (*path[:-1], name), array
                continue
            for layer, row in enumerate(array, config.num_layers - len(array)):
                yield (*module_path(config, ".".join(path[2:-1]), layer), name), row


def read_adapter(folder: storage.Path) -> StoredAdapter:
    """Opens a PEFT folder; reads no weights, and nothing of the base.

    Raises:
        MissingModelError: If there are no weights in safetensors.
        ModelError: If `adapter_config.json` is not that of a LoRA, or of one that is not supported; names the field.
    """
    fields, file = read_json(folder / ADAPTER), folder / ADAPTER_WEIGHTS
    try:
        check_fields(fields)
    except ModelError as error:
        raise ModelError(f"{folder / ADAPTER}: {error}") from error
    if not storage.is_file(file):
        pickled = "; pickled weights are never opened: save it as safetensors with peft's save_pretrained"
        there = pickled if storage.matching(folder, "adapter_model.bin") else "; fetch the folder again"
        raise MissingModelError(f"{folder}: {ADAPTER}, but no {ADAPTER_WEIGHTS}{there}")
    tensors = Tensors(folder, file)
    tensors.entries = {name.removeprefix(PREFIX): entry for name, entry in tensors.entries.items()}
    adapter = StoredAdapter(folder, fields, tensors)
    task = fields.get("task_type")
    if adapter.scores != (task == "SEQ_CLS") and task is not None:
        there = "but there is a" if adapter.scores else "but there is no"
        raise ModelError(f"{folder / ADAPTER}: task_type is {task!r}, {there} tensor '{PREFIX}score.weight'; {ANOTHER}")
    if adapter.scores and (shape := tensors.entries["score.weight"].shape)[:1] != (1,):
        raise ModelError(
            f"{file}: tensor '{PREFIX}score.weight' is {list(shape)}; a reward or cost model has one label"
        )
    return adapter
