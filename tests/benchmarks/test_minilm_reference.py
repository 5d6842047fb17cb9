"""The BERT of benchmarks/real/minilm.py against transformers', with random weights."""

import jax
import numpy as np
import pytest

from benchmarks.real.minilm import mean_states

pytestmark = pytest.mark.reference


def test_mean_states_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    model = BertModel(config).eval()
    tokens, lengths = np.random.default_rng(0).integers(1, 50, (3, 10)), np.array([10, 4, 7])
    mask = np.arange(10) < lengths[:, None]
    with torch.no_grad():
        output = model(torch.tensor(tokens), torch.tensor(mask), output_hidden_states=True)
    states = np.stack([state.numpy() for state in output.hidden_states], 1)
    expected = np.einsum("BLSD,BS->BLD", states, mask / mask.sum(-1, keepdims=True))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with jax.numpy_rank_promotion("allow"):
        found = mean_states(weights, tokens, mask, layers=3, heads=4)
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)
