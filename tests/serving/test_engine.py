"""What the engine does apart from HTTP."""

from pathlib import Path

import pytest

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.pipeline import load_policy, load_scorer
from safe_rlhf_jax.serving.answers import Answer, Job
from safe_rlhf_jax.serving.engine import Engine, Limits, buckets
from tests.helpers import make_scorer, perturbed, tiny_config
from tests.tokenizers import make_tokenizer


@pytest.mark.parametrize(
    ("least", "most", "sizes"),
    [(1, 16, (1, 4, 16)), (1, 8, (1, 4, 8)), (1, 1, (1,)), (64, 1024, (64, 256, 1024)), (64, 40, (40,))],
)
def test_few_shapes_are_compiled(least, most, sizes):
    assert buckets(least, most) == sizes


def test_a_scorer_with_another_tokenizer_reads_the_text_in_its_own_way(models, tmp_path, caplog):
    template = (Path(__file__).parent.parent / "data" / "chat_templates" / "chatml.jinja").read_text()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = make_tokenizer(tmp_path, tokens, "<|im_end|>", spaces=None, template=template)
    module, variables = make_scorer("cost", tiny_config(vocab_size=own.vocab_size))
    hf.save(tmp_path, module, perturbed(variables), own.hf)
    policy, scorer = load_policy(str(models / "policy")), load_scorer(str(tmp_path))
    engine = Engine(policy, {"cost": scorer}, Limits(prompt=64, response=8, batch=2, queue=1))
    turns, pieces = [{"role": "user", "content": "hello"}], []
    texts = ["fine", "word " * 60, ""]
    for text in texts:
        answer = Answer(Job(turns, [5], pieces.append, 8), 0, policy.tokenizer.decode, engine.ends)
        answer.text, answer.finish = text, "stop"
        pieces.append(engine.scores([answer])["cost"][0])
    assert pieces == [pytest.approx(scorer(["hello"], ["fine"])[0], abs=1e-4), None, None]
