"""Two layouts of score models in Hugging Face folders.

`beaver`: `*ForScore` of the reference, with a bias and a normaliser (REFERENCE section 4). `sequence_classification`:
transformers' `*ForSequenceClassification` with one label, the layout of most public reward models. It has neither, and
reads the score of a text at its last token whose id is not the padding id.
"""

import dataclasses
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, get_args

import numpy as np

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.config import Layout, ScoreConfig, ScoreType
from safe_rlhf_jax.models.families import Family
from safe_rlhf_jax.models.safetensors_io import Tensors
from safe_rlhf_jax.models.transformer import NORMALIZER_EPS
from safe_rlhf_jax.models.weights import Path, Weight

HEADS: dict[Layout, str] = {"beaver": "score_head", "sequence_classification": "score"}
ARCHITECTURES: dict[Layout, str] = {"beaver": "ForScore", "sequence_classification": "ForSequenceClassification"}
KERNEL: Path = ("score_kernel",)
BIAS: Path = ("score_bias",)
# Fields of the layouts in config.json; `bias` is an older spelling of `score_bias`.
FIELDS = ("score_dim", "score_type", "score_bias", "bias", "do_normalize", "momentum", "normalizer_type", "mean", "var")


def score_weights(score: ScoreConfig, layout: Layout) -> dict[str, Weight]:
    """Returns {stored name: Weight} of the score head."""
    weights = {f"{HEADS[layout]}.weight": Weight((KERNEL,), in_ndim=1)}
    if score.bias:
        weights[f"{HEADS[layout]}.bias"] = Weight((BIAS,), in_ndim=0)
    return weights


def stored_layout(hf: Mapping[str, Any], names: Collection[str] = ()) -> Layout | None:
    """Returns the layout of a folder, None for one without a score head."""
    architecture = str((hf.get("architectures") or [""])[0])
    for layout, head in HEADS.items():
        if f"{head}.weight" in names or architecture.endswith(ARCHITECTURES[layout]):
            return layout
    return None


def stored_score_type(hf: Mapping[str, Any], names: Collection[str] = ()) -> ScoreType | None:
    """Returns the score type of a folder; sequence classification without the field is a reward model.

    Raises:
        ModelError: If the field has another value.
    """
    default = "reward" if stored_layout(hf, names) == "sequence_classification" else None
    stored = hf.get("score_type") or default
    kind: Any = stored.strip().lower() if isinstance(stored, str) else stored
    if kind not in (*get_args(ScoreType), None):
        raise ModelError(f"config.json: score_type {stored!r}: write one of {get_args(ScoreType)}")
    return kind  # type: ignore[no-any-return]


def check_scores(hf: Mapping[str, Any], names: Collection[str], score_type: ScoreType | None) -> None:
    """Checks that a folder holds a score head of the expected kind.

    Args:
        hf: `config.json`.
        names: Of the stored tensors.
        score_type: The kind; None takes the folder's.

    Raises:
        ModelError: If it does not; names the fix.
    """
    kind = stored_score_type(hf, names)
    if stored_layout(hf, names) is None:
        raise ModelError(
            "holds no score head (language models have none); a new one would score at random. Train a reward or cost "
            "stage from it (init_from), and name what that exports"
        )
    if score_type is not None and kind not in (score_type, None):
        raise ModelError(
            f"config.json: score_type is {kind!r}, not {score_type!r}; if its scores are {score_type}s, write "
            f'"score_type": "{score_type}" there'
        )


def read_score_config(
    hf: Mapping[str, Any], names: Collection[str], score_type: ScoreType | None, score_bias: bool | None
) -> ScoreConfig:
    """Reads the score fields of `config.json`, in the spelling of either version of the reference.

    Args:
        hf: `config.json`.
        names: Of the stored tensors: these decide, as the field for the bias changed name and default.
        score_type: Overrides the stored one.
        score_bias: Of a head that is not stored; by default as in config.json.

    Raises:
        ModelError: If the score type is unknown, or there are several labels.
    """
    layout, kind = stored_layout(hf, names), score_type or stored_score_type(hf, names)
    if kind is None:
        raise ModelError("score_type None: pass score_type='reward', 'cost' or 'critic'")
    if kind not in get_args(ScoreType):
        raise ModelError(f"score_type {kind!r}: pass one of {get_args(ScoreType)}")
    for field in ("id2label", "num_labels") if layout == "sequence_classification" else ("score_dim",):
        labels = hf.get(field) or 1
        count = labels if isinstance(labels, int) else len(labels)
        if count != 1:
            raise ModelError(f"config.json: {field} has {count} labels; a reward or cost model has one")
    if layout == "sequence_classification":
        pad_id = hf.get("pad_token_id")
        has_pad = kind != "critic" and pad_id is not None and pad_id >= 0  # some write −1 for none
        return ScoreConfig(kind, bias="score.bias" in names, pad_id=pad_id if has_pad else None)
    if layout == "beaver":
        bias = "score_head.bias" in names
    else:
        bias = hf.get("score_bias", hf.get("bias", True)) if score_bias is None else score_bias
    return ScoreConfig(kind, bool(bias), bool(hf.get("do_normalize")) and kind != "critic", hf.get("momentum"))


def read_statistics(hf: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the normaliser {mean f32[1], var f32[1], count i32[1]}: stored, from config.json, or fresh.

    Raises:
        ModelError: If one of them is not a finite number, or the variance is negative.
    """
    out = {}
    for name, start in (("mean", 0.0), ("var", 1.0), ("count", 0)):
        stored, field = f"normalizer.{name}", hf.get(name) if name != "count" else None
        where, value = f"config.json: {name}", start if field is None else field
        if stored in tensors.entries:
            where, value = f"tensor {stored!r}", tensors[stored].tolist()
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) != 1 or type(numbers[0]) not in (int, float) or not math.isfinite(numbers[0]):
            raise ModelError(f"{where} is {value!r}; the normaliser of a score has one finite number, as in [{start}]")
        if name != "mean" and numbers[0] < 0:
            raise ModelError(f"{where} is {value!r}; it cannot be negative")
        out[name] = np.array(numbers, np.int32 if name == "count" else np.float32)
    return out


@dataclasses.dataclass(frozen=True)
class Stored:
    """A score model in the spelling of a layout."""

    score: ScoreConfig
    head: dict[Path, np.ndarray]
    buffers: dict[str, np.ndarray]
    fields: dict[str, Any]  # of config.json


def in_layout(
    layout: Layout,
    this: Family,
    score: ScoreConfig,
    head: Mapping[Path, np.ndarray],
    stats: Mapping[str, np.ndarray],
    hf: Mapping[str, Any],
) -> Stored:
    """Returns a score model in the spelling of a layout.

    Args:
        layout: The layout.
        this: Family of the decoder.
        score: Configuration of the head.
        head: Its parameters.
        stats: The normaliser: mean f32[1], var f32[1], count i32[1]; empty for a critic.
        hf: `config.json`, special tokens included.

    Raises:
        ModelError: If the layout would read another token's score.
    """
    hf = {name: value for name, value in hf.items() if name not in FIELDS}
    end = hf.get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    if layout == "sequence_classification":
        score, head = without_normalizer(score, head, stats)
        if score.bias:
            warnings.warn(
                f"score.bias {float(head[BIAS][0]):.6g} is written, but transformers' classes have no bias: scores "
                "that they compute lack it. Train with `export_layout: sequence_classification` for a head without",
                stacklevel=3,
            )
        pad_id = hf.get("pad_token_id")
        if score.pad_id is not None:
            pad_id = score.pad_id
        elif pad_id in ends:
            pad_id = None  # EOS, which carries the score, would be skipped; without it transformers takes single texts
        fields: dict[str, Any] = {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": pad_id,
            "score_type": score.score_type,
        }
        buffers: dict[str, np.ndarray] = {}
    else:
        if score.pad_id is not None and score.pad_id in ends:
            raise ModelError(
                f"the score is read at the last token other than {score.pad_id}, padding and EOS alike, which the "
                "beaver layout cannot say; save with layout='sequence_classification'"
            )
        fields = {
            "score_dim": 1,
            "score_bias": score.bias,
            "score_type": score.score_type,
            "do_normalize": score.normalize,
            "momentum": score.momentum,
            "normalizer_type": "RunningMeanStd" if score.momentum is None else "ExponentialMovingAverage",
        } | {name: stats[name].tolist() for name in ("mean", "var") if stats}
        buffers = {f"normalizer.{k}": v.astype(np.int64) if k == "count" else v for k, v in stats.items()}
    fields["architectures"] = [this.score.replace("ForScore", ARCHITECTURES[layout])]
    return Stored(score, dict(head), buffers, hf | fields)


def without_normalizer(
    score: ScoreConfig, head: Mapping[Path, np.ndarray], stats: Mapping[str, np.ndarray]
) -> tuple[ScoreConfig, dict[Path, np.ndarray]]:
    """Folds the normaliser into the head; the scores stay the same, and a zero bias is removed."""
    kernel, bias = head[KERNEL], head.get(BIAS, np.zeros(1, np.float32))
    if score.normalize:
        std = np.sqrt(stats["var"]) + NORMALIZER_EPS
        mean = stats["mean"] if score.score_type == "reward" else 0.0
        kernel, bias = (kernel / std).astype(kernel.dtype), ((bias - mean) / std).astype(bias.dtype)
    score = dataclasses.replace(score, normalize=False, momentum=None, bias=bool(bias.any()))
    return score, {KERNEL: kernel} | ({BIAS: bias} if score.bias else {})
