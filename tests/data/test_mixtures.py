"""Mixtures are drawn by weight or by size, and processes share the batch that one process would have."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.examples import Examples, load_supervised
from safe_rlhf_jax.data.formats import PART
from safe_rlhf_jax.data.loader import Batches
from safe_rlhf_jax.data.sources import mix
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.stages.common import described, read_mixture, weights
from safe_rlhf_jax.types import PromptBatch


def rows(*sizes):
    """Parts of a mixture; a row's token is its number."""
    n = sum(sizes)
    tokens = np.arange(n, dtype=np.int32)[:, None]
    records = mix([[{} for _ in range(size)] for size in sizes])
    return Examples(PromptBatch(tokens, np.ones((n, 1), bool), np.zeros(n, np.int32)), records, {}, 0)


SIZES = st.lists(st.integers(500, 900), min_size=1, max_size=3)  # grain shuffles small ranges slowly


@settings(max_examples=8)
@given(SIZES, st.data())
def test_parts_are_drawn_by_weight_whatever_their_size(sizes, data):
    weights = data.draw(st.lists(st.floats(0.2, 5.0), min_size=len(sizes), max_size=len(sizes)))
    examples = rows(*sizes)
    batches = Batches(examples, batch_size=50, seed=0, weights=weights)
    drawn = np.concatenate([batches(step).tokens[:, 0] for step in range(6)])
    shares = np.bincount(examples.parts[drawn], minlength=len(sizes)) / drawn.size
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.03)


@settings(max_examples=8)
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_shares_of_processes_make_up_the_batch_of_one(sizes, seed, per_process, count, weighted):
    examples = rows(*sizes)
    options = {"batch_size": per_process * count, "seed": seed, "weights": [1.0] * len(sizes) if weighted else None}
    whole = Batches(examples, **options)
    parts = [Batches(examples, **options, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 5, 2):
        together = [part(step) for part in parts]
        assert all(len(part.tokens) == per_process for part in together)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *together)
        jax.tree.map(np.testing.assert_array_equal, joined, whole(step))


def test_every_part_visits_its_rows_evenly():
    examples = rows(60, 300)
    batches = Batches(examples, batch_size=120, seed=3, weights=[1.0, 1.0])
    seen = Counter(int(row) for step in range(10) for row in batches(step).tokens[:, 0])
    assert {seen[row] for row in range(60)} == {10}
    assert {seen[row] for row in range(60, 360)} == {2}


def test_batch_that_does_not_divide_into_the_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size 8 does not divide into 3 processes"):
        Batches(rows(9), batch_size=8, seed=0, process_count=3)


def test_part_without_a_usable_record_is_refused():
    examples = rows(3)
    with pytest.raises(ValueError, match="part 1 of the mixture has no record"):
        Batches(examples, batch_size=2, seed=0, weights=[1.0, 1.0])


def test_skipped_records_leave_the_parts_of_the_others_alone():
    good, bad = {"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}
    records = mix([[bad, good], [good, bad, good], [good]])
    tokenizer = load_tokenizer("demo")
    data = load_supervised(records, TEMPLATES["plain"], tokenizer, max_length=16, where="here", max_bad=0.5)
    assert data.parts.tolist() == [0, 1, 1, 2]


# --- In a config


def stage(data, **more):
    fields = {"name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": data} | more
    return cfg.RunConfig(workdir="unused", stages=(fields,)).stages[0]


def test_mixture_of_a_config_is_read_in_order_with_its_weights():
    parts = [{"name": "demo/sft", "limit": 2, "weight": 3.0}, {"name": "demo/sft", "split": "test", "weight": 1.0}]
    data = stage(parts).data
    records = read_mixture(data)
    assert weights(data) == [3.0, 1.0]
    assert [record[PART] for record in records[:3]] == [0, 0, 1]
    assert described(data) == "data demo/sft (train) + demo/sft (test)"
    assert weights(stage([{"name": "a"}, {"name": "b"}]).data) is None
    assert PART not in read_mixture(stage({"name": "demo/sft", "limit": 2, "weight": 1.0}).data)[0]


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (
            [{"name": "a", "weight": 1.0}, {"name": "b"}],
            {},
            "some parts of the mixture have a weight and some",
        ),
        ([], {}, "at least 1"),
        ([{"name": "a", "weight": 0}], {}, "greater than 0"),
        ([{"name": "a", "weigth": 1.0}], {}, "did you mean 'stages.0.data.0.weight'"),
        ({"name": "a", "unique": "text"}, {}, "'record'"),
        (
            {"name": "a"},
            {"eval_data": {"name": "a", "split": "test", "test_share": 0.1}},
            "data and eval_data read 'a' with test_share None and 0.1",
        ),
    ],
)
def test_mixture_that_cannot_be_is_refused(tmp_path, data, more, message):
    import yaml

    fields = {"name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": data} | more
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"workdir": "unused", "stages": [fields]}))
    with pytest.raises(ConfigError) as error:
        cfg.load_config(tmp_path / "run.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
