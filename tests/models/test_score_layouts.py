"""Score models in the layouts of the reference and of transformers' sequence classification."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax import ops
from safe_rlhf_jax.models import hf
from tests.helpers import apply, make_lm, make_scorer, perturbed, right_padded, tiny_config

PAD = 5
ONE = tiny_config(num_layers=1)
sequence_scores = functools.partial(jax.jit, static_argnums=0, static_argnames="first")(ops.sequence_scores)
load = functools.partial(hf.load, scan_layers=False)  # as in ONE, so that what is compiled is shared


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_stats(variables):
    stats = {"mean": jnp.array([0.5]), "var": jnp.array([4.0]), "count": jnp.array([12], jnp.int32)}
    return perturbed(variables) | {"stats": stats}


@pytest.fixture
def classifier(tmp_path):
    """A reward model as others publish it: nothing in config.json is ours."""
    module, variables = make_scorer("reward", ONE, bias=False)
    folder = hf.save(tmp_path / "classifier", module, perturbed(variables), layout="sequence_classification")
    config = json.loads((folder / "config.json").read_text())
    del config["score_type"]
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": PAD}))
    return folder


def scores(module, variables, tokens, mask):
    return np.asarray(sequence_scores(module, variables, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))


# --- In ---------------------------------------------------------------------------------------------------------------


def test_sequence_classification_is_a_reward_model_unless_told_otherwise(classifier):
    module, variables = load(classifier, "score")
    assert (module.score.score_type, module.score.bias, module.score.pad_id) == ("reward", False, PAD)
    assert set(variables["stats"]) == {"mean", "var", "count"}
    assert load(classifier, "score", score_type="cost")[0].score.score_type == "cost"
    edit_config(classifier, score_type="cost")
    assert load(classifier, "score")[0].score.score_type == "cost"


def test_score_is_read_at_the_last_token_that_is_not_padding_by_id(classifier):
    module, variables = load(classifier, "score")
    rng = np.random.default_rng(0)
    text = rng.integers(6, 97, 5)
    alone = scores(module, variables, jnp.array([text]), jnp.ones((1, 5), bool))
    one = jnp.array([[*text, PAD, PAD, PAD]], jnp.int32)
    for length in (5, 6, 8):  # as many of the last three as the mask calls real
        mask = jnp.arange(8)[None] < length
        np.testing.assert_allclose(scores(module, variables, one, mask), alone, rtol=1e-5, atol=1e-5)
    left = jnp.array([[PAD, PAD, *text, PAD]], jnp.int32)
    np.testing.assert_allclose(scores(module, variables, left, jnp.arange(8)[None] >= 2), alone, rtol=1e-5, atol=1e-5)


def test_scores_from_a_column_on_are_those_of_the_whole(classifier):
    module, variables = load(classifier, "score")
    tokens, mask = right_padded(np.random.default_rng(1), 4, 9, 97)
    tokens, mask = tokens[:, ::-1], mask[:, ::-1]
    tokens = tokens.at[:, -1].set(PAD).at[2, -3:].set(PAD)
    whole = scores(module, variables, tokens, mask)
    for first in (3, 5):
        np.testing.assert_allclose(
            sequence_scores(module, variables, tokens, mask, first=first), whole, rtol=1e-5, atol=1e-5
        )


def test_a_critic_from_sequence_classification_values_every_token(classifier):
    reward, variables = load(classifier, "score")
    critic, critic_variables = load(classifier, "score", score_type="critic")
    assert critic.score.pad_id is None
    assert "stats" not in critic_variables
    tokens = jnp.array([[7, 8, PAD, 9, PAD, PAD]], jnp.int32)
    values = apply(critic, critic_variables, tokens, jnp.ones((1, 6), bool))
    assert np.unique(np.asarray(values)).size == 6
    held = apply(reward, variables, tokens, jnp.ones((1, 6), bool))
    np.testing.assert_array_equal(held[:, :4], values[:, :4])
    np.testing.assert_array_equal(held[:, 4:], np.repeat(values[:, 3:4], 2, axis=1))


def test_a_bias_of_the_score_is_read(classifier):
    _, before = load(classifier, "score")
    path = classifier / hf.WEIGHTS
    save_file(load_file(path) | {"score.bias": np.array([1.5], np.float32)}, path)
    module, variables = load(classifier, "score")
    batch = right_padded(np.random.default_rng(0), 2, 4, 97)
    assert module.score.bias
    without = module.clone(score=dataclasses.replace(module.score, bias=False))
    np.testing.assert_allclose(
        scores(module, variables, *batch), scores(without, before, *batch) + 1.5, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, r"config\.json: id2label has 2 labels"),
        ({"num_labels": 3, "id2label": None}, r"config\.json: num_labels has 3 labels"),
    ],
)
def test_several_labels_are_refused_by_the_name_of_the_field(classifier, changes, message):
    edit_config(classifier, **changes)
    with pytest.raises(ValueError, match=message):
        load(classifier, "score")


def test_a_classifier_of_two_labels_that_does_not_say_so_is_refused_by_its_shape(classifier):
    path = classifier / hf.WEIGHTS
    save_file(load_file(path) | {"score.weight": np.zeros((2, 48), np.float32)}, path)
    with pytest.raises(ValueError, match=r"'score\.weight' has shape \(2, 48\).*\(1, 48\)"):
        load(classifier, "score")


@pytest.mark.parametrize(("layout", "head"), [("beaver", "score_head"), ("sequence_classification", "score")])
def test_a_score_model_without_its_head_gets_no_fresh_one(tmp_path, layout, head):
    module, variables = make_scorer("reward", ONE, bias=False)
    folder = hf.save(tmp_path, module, variables, layout=layout)
    path = folder / hf.WEIGHTS
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(head)}, path)
    with pytest.raises(ValueError, match=rf"'{head}\.weight' is missing"):
        load(folder, "score")


@pytest.fixture
def language_model(tmp_path):
    return hf.save(tmp_path / "lm", *make_lm(ONE))


def test_a_language_model_has_no_scores_to_use_as_they_are(language_model):
    for score_type in (None, "reward", "cost"):
        with pytest.raises(ValueError, match=r"lm: holds no score head .*at random.*Train a reward or cost stage"):
            load(language_model, "score", score_type=score_type, as_stored=True)
    edit_config(language_model, score_type="reward")  # saying so makes no head
    with pytest.raises(ValueError, match="holds no score head"):
        load(language_model, "score", as_stored=True)
    load(language_model, "score", score_type="reward")  # to be trained


@pytest.mark.parametrize("stored", ["reward", "cost", "critic"])
@pytest.mark.parametrize("used", ["reward", "cost", None])
def test_scores_of_another_kind_are_not_used_as_they_are(tmp_path, stored, used):
    folder = hf.save(tmp_path, *make_scorer(stored, ONE))
    if used in (stored, None):
        assert load(folder, "score", score_type=used, as_stored=True)[0].score.score_type == stored
    else:
        with pytest.raises(ValueError, match=f"score_type is '{stored}', not '{used}'.*\"score_type\": \"{used}\""):
            load(folder, "score", score_type=used, as_stored=True)
        assert load(folder, "score", score_type=used)[0].score.score_type == used


def test_a_classifier_is_known_by_its_head_where_no_architecture_is_written(classifier):
    edit_config(classifier, architectures=None)
    assert load(classifier, "score", as_stored=True)[0].score.score_type == "reward"
    edit_config(classifier, architectures="LlamaForSequenceClassification")
    assert load(classifier, "score", as_stored=True)[0].score.score_type == "reward"


@pytest.mark.parametrize(("written", "read"), [("Reward", "reward"), (" COST ", "cost"), (None, "reward")])
def test_the_kind_of_score_is_read_in_any_case(classifier, written, read):
    edit_config(classifier, score_type=written)
    assert load(classifier, "score", as_stored=True)[0].score.score_type == read


@pytest.mark.parametrize("written", ["preference", "reward_model", 1, ["reward"]])
def test_a_kind_of_score_that_is_none_is_named(classifier, written):
    edit_config(classifier, score_type=written)
    with pytest.raises(ValueError, match=r"classifier: config\.json: score_type .* write one of .*'reward', 'cost'"):
        load(classifier, "score")


@pytest.mark.parametrize("problem", ["regression", None])
def test_the_problem_type_of_a_classifier_changes_no_score(classifier, problem):
    batch = right_padded(np.random.default_rng(0), 2, 4, 97)
    expected = scores(*load(classifier, "score"), *batch)
    edit_config(classifier, problem_type=problem)
    np.testing.assert_array_equal(scores(*load(classifier, "score"), *batch), expected)


def test_a_padding_token_of_minus_one_is_none(classifier):
    edit_config(classifier, pad_token_id=-1)
    assert load(classifier, "score")[0].score.pad_id is None


def test_a_head_that_lies_on_its_side_is_named(classifier):
    path = classifier / hf.WEIGHTS
    save_file(load_file(path) | {"score.weight": np.zeros((48, 1), np.float32)}, path)
    with pytest.raises(ValueError, match=r"'score\.weight' has shape \(48, 1\).*\(1, 48\)"):
        load(classifier, "score")


@pytest.fixture
def normalised(tmp_path):
    """A reward model whose normaliser stands in config.json alone."""
    folder = hf.save(tmp_path / "normalised", *make_scorer("reward", ONE, normalize=True))
    path = folder / hf.WEIGHTS
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("normalizer")}, path)
    return folder


@pytest.mark.parametrize(
    ("mean", "var", "expected"),
    [(None, None, (0.0, 1.0)), ([2.0], [4.0], (2.0, 4.0)), (2.0, 4, (2.0, 4.0)), (None, [9.0], (0.0, 9.0))],
)
def test_a_normaliser_in_config_is_one_number_each(normalised, mean, var, expected):
    edit_config(normalised, mean=mean, var=var)
    stats = load(normalised, "score")[1]["stats"]
    assert {name: value.shape for name, value in stats.items()} == {"mean": (1,), "var": (1,), "count": (1,)}
    assert (float(stats["mean"][0]), float(stats["var"][0])) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("mean", value)
            for value in ([], [[0.5]], [0.1, 0.2], "0.5", ["0.5"], [None], [float("nan")], True, {"a": 1})
        ),
        *(("var", value) for value in ([-1.0], [float("inf")], [])),
    ],
    ids=str,
)
def test_a_normaliser_that_is_no_number_is_named(normalised, field, value):
    edit_config(normalised, **{field: value})
    with pytest.raises(ValueError, match=rf"normalised: config\.json: {field} is "):
        load(normalised, "score")


@pytest.mark.parametrize("value", [np.zeros(0), np.zeros(2), np.array([np.nan]), np.zeros((1, 1))])
def test_a_stored_normaliser_that_is_no_number_is_named(normalised, value):
    path = normalised / hf.WEIGHTS
    save_file(load_file(path) | {"normalizer.mean": value.astype(np.float32)}, path)
    with pytest.raises(ValueError, match=r"normalised: tensor 'normalizer\.mean' "):
        load(normalised, "score")


def test_a_score_of_several_numbers_is_refused_by_the_name_of_the_field(normalised):
    edit_config(normalised, score_dim=4)
    with pytest.raises(ValueError, match=r"config\.json: score_dim has 4 labels"):
        load(normalised, "score")


# --- Out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["beaver", "sequence_classification"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_both_layouts_load_back_with_equal_scores(tmp_path, kind, normalize, layout):
    module, variables = make_scorer(kind, ONE, normalize=normalize)
    variables = with_stats(variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the bias that transformers would leave out
        folder = hf.save(tmp_path, module, variables, layout=layout)
    again, loaded = load(folder, "score")
    assert again.score.score_type == kind
    batch = right_padded(np.random.default_rng(0), 4, 9, 97)
    expected = scores(module, variables, *batch)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores(again, loaded, *batch), expected, rtol=1e-5, atol=1e-5)
    names = load_file(folder / hf.WEIGHTS)
    assert ("score_head.weight" in names, "score.weight" in names) == (layout == "beaver", layout != "beaver")
    assert any(name.startswith("normalizer") for name in names) == (layout == "beaver")


@pytest.mark.parametrize("layout", ["beaver", "sequence_classification"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_model_keeps_its_layout_and_every_bit(tmp_path, layout, dtype):
    module, variables = make_scorer("cost", ONE, bias=False)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), perturbed(variables)["params"])
    first = hf.save(tmp_path / "first", module, variables | {"params": params}, layout=layout)
    second = hf.save(tmp_path / "second", *load(first, "score", dtype))
    for file in ("config.json", hf.WEIGHTS):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_one_layout_becomes_the_other_without_leftovers(tmp_path):
    module, variables = make_scorer("reward", ONE, bias=False, normalize=True)
    beaver = hf.save(tmp_path / "beaver", module, with_stats(variables))
    with pytest.warns(UserWarning, match="transformers' classes have no bias"):  # mean/σ of the normaliser
        other = hf.save(tmp_path / "other", *load(beaver, "score"), layout="sequence_classification")
    config = json.loads((other / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert not {"score_dim", "score_bias", "do_normalize", "momentum", "normalizer_type", "mean", "var"} & set(config)
    back = hf.save(tmp_path / "back", *load(other, "score"), layout="beaver")
    assert json.loads((back / "config.json").read_text())["architectures"] == ["LlamaForScore"]
    assert load(back, "score")[0].score.normalize is False


def test_a_bias_that_transformers_would_leave_out_is_warned_of(tmp_path):
    module, variables = make_scorer("cost", ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.save(tmp_path / "zero", module, variables, layout="sequence_classification")  # zero, so it is left out
    assert "score.bias" not in load_file(tmp_path / "zero" / hf.WEIGHTS)
    with pytest.warns(UserWarning, match=r"score\.bias .*export_layout"):
        hf.save(tmp_path / "bias", module, perturbed(variables), layout="sequence_classification")
    assert "score.bias" in load_file(tmp_path / "bias" / hf.WEIGHTS)


@pytest.mark.parametrize(("pad", "end", "written"), [(3, 2, 3), (2, 2, None), (None, 2, None)])
def test_the_padding_token_is_written_where_it_leaves_the_last_token_alone(tmp_path, pad, end, written):
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, end, pad

        def save_pretrained(self, folder):
            pass

    module, variables = make_scorer("reward", ONE, bias=False)
    folder = hf.save(tmp_path, module, variables, Tokenizer(), layout="sequence_classification")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == written


def test_a_score_before_eos_is_not_written_in_a_layout_that_reads_it_at_eos(classifier, tmp_path):
    edit_config(classifier, eos_token_id=PAD)
    with pytest.raises(ValueError, match="padding and EOS alike"):
        hf.save(tmp_path / "beaver", *load(classifier, "score"), layout="beaver")
    hf.save(tmp_path / "same", *load(classifier, "score"))


def test_a_fresh_head_may_have_no_bias(tmp_path):
    folder = hf.save(tmp_path, *make_lm(ONE))
    assert "score_bias" not in load(folder, "score", score_type="cost", score_bias=False)[1]["params"]
    assert "score_bias" in load(folder, "score", score_type="cost")[1]["params"]


# --- transformers -----------------------------------------------------------------------------------------------------


def classifier_batch(side):
    """Texts that end with EOS (2) among padding on either side, and the mask of what is real."""
    rng = np.random.default_rng(3)
    lengths, width = (4, 9, 6), 9
    rows, masks = [], []
    for n in lengths:
        text, padding = [*rng.integers(6, 97, n - 1), 2], [PAD] * (width - n)
        rows.append(padding + text if side == "left" else text + padding)
        masks.append([0] * len(padding) + [1] * n if side == "left" else [1] * n + [0] * len(padding))
    return np.array(rows), np.array(masks, bool)


def their_scores(model, tokens, mask):
    import torch

    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    return out.logits[:, 0].numpy()


@pytest.mark.reference
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["pad", "pad is eos"])
def test_scores_equal_those_of_transformers(tmp_path, pad_is_eos, side):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    pad = 2 if pad_is_eos else PAD
    fields = json.loads((hf.save(tmp_path / "lm", *make_lm(ONE)) / "config.json").read_text())
    theirs = LlamaForSequenceClassification(LlamaConfig(**fields | {"pad_token_id": pad, "num_labels": 1})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, mask = classifier_batch(side)
    tokens = np.where(mask, tokens, pad)
    module, variables = load(tmp_path / "theirs", "score")
    assert module.score.pad_id == pad
    actual = scores(module, variables, tokens, mask)
    np.testing.assert_allclose(actual, their_scores(theirs, tokens, mask), rtol=1e-5, atol=1e-5)
    # and we write them back as they were
    again = load_file(hf.save(tmp_path / "again", module, variables) / hf.WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, again, load_file(tmp_path / "theirs" / hf.WEIGHTS))


@pytest.mark.reference
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
def test_transformers_opens_the_sequence_classification_layout_with_equal_scores(tmp_path, normalize, side):
    import torch
    from transformers import AutoModelForSequenceClassification

    module, variables = make_scorer("cost", ONE, bias=False, normalize=normalize)
    variables = with_stats(variables)
    folder = hf.save(tmp_path, module, variables, layout="sequence_classification")
    edit_config(folder, pad_token_id=PAD)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = classifier_batch(side)
    actual = scores(module, variables, tokens, mask)
    np.testing.assert_allclose(actual, their_scores(theirs.eval(), tokens, mask), rtol=1e-5, atol=1e-5)
