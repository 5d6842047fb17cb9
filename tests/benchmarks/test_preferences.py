"""What benchmarks measure preference models with: pairs, intervals, batches of like length."""

import numpy as np
import yaml

from benchmarks.preferences import Pairs, accuracy, batches, network
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.pipeline import load_scorer
from tests.helpers import make_scorer, perturbed, tiny_config

ROWS = [
    {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 1}
    | {"is_response_0_safe": False, "is_response_1_safe": True},
    {"prompt": "q", "response_0": "c", "response_1": "d", "safer_response_id": 0}
    | {"is_response_0_safe": True, "is_response_1_safe": False},
    {"prompt": "r", "response_0": "", "response_1": "d", "safer_response_id": 1},
]


def test_a_pair_without_a_response_is_left_out_and_rows_of_one_prompt_are_known_as_such():
    pairs = Pairs(ROWS)
    assert pairs.responses == [["a", "b"], ["c", "d"]]
    assert pairs.better.tolist() == [1, 0]
    assert pairs.safe.tolist() == [[False, True], [True, False]]
    assert pairs.prompt.tolist() == [0, 0]


def test_ties_are_half_right_and_signs_count_where_there_are_labels():
    found = accuracy(Pairs(ROWS), np.array([1.0, 0.0]), np.array([[-1.0, 1.0], [-1.0, -1.0]]))
    assert found["ranking"]["accuracy"] == 0.75
    assert found["sign"]["accuracy"] == 0.75
    assert accuracy(Pairs(ROWS), np.array([1.0, 0.0])).keys() == {"ranking"}


def test_batches_hold_every_text_once_under_its_mask():
    ids = [[1] * n for n in (3, 40, 32, 5, 33, 1)]
    seen = {}
    for rows, tokens, mask in batches(ids, size=64, step=32):
        assert tokens.size == 64
        assert mask.any(-1).all()  # what fills a batch is no empty text
        seen |= {int(row): tokens[i][mask[i]].tolist() for i, row in enumerate(rows)}
    assert [seen[i] for i in range(len(ids))] == ids


def test_an_exported_model_is_scored_as_its_stage_reads_texts(tmp_path):
    tokenizer = load_tokenizer("demo")
    module, variables = make_scorer("cost", tiny_config(vocab_size=tokenizer.vocab_size))
    stage = tmp_path / "cost"
    hf.save(stage / "export", module, perturbed(variables), tokenizer.hf)
    config = {"template": "beaver", "stages": [{"name": "cost", "max_length": 1000}]}
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    pairs = Pairs(ROWS)
    scorer = load_scorer(str(stage / "export"), template="beaver")
    costs = np.array([scorer(["q", "q"], responses) for responses in pairs.responses])
    assert network("cost", pairs, stage) == accuracy(pairs, costs[:, 0] - costs[:, 1], -costs)
