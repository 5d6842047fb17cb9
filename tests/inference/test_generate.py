import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax import ops
from safe_rlhf_jax.aot.collectives import find_collectives
from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.inference import generate as generating
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.sharding import init_sharded, make_mesh
from safe_rlhf_jax.types import PromptBatch
from tests.helpers import apply, compilations, make_lm, perturbed, prompt_batch, tiny_config

VOCAB, EOS, PAD = 17, 2, 0
BATCH, PROMPT, RESPONSE = 4, 6, 12
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

response_log_probs = jax.jit(ops.response_log_probs, static_argnames=("module", "prompt_length", "temperature"))


@pytest.fixture(scope="module")
def lm():
    module, variables = make_lm(tiny_config(vocab_size=VOCAB))
    return module, perturbed(variables)["params"]


@pytest.fixture(scope="module")
def prompts():
    batch = prompt_batch(np.random.default_rng(0), BATCH, PROMPT, VOCAB)
    return batch.replace(group=jnp.arange(BATCH, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("module", "options"))
def run(module, params, prompts, key, options):
    return generate(module, params, prompts, key, **dict(options))


def sample(lm, prompts, seed=0, **options):
    module, params = lm
    options = {"response_length": RESPONSE, "eos_id": EOS, "pad_id": PAD, "sampling": Sampling()} | options
    return run(module, params, prompts, jax.random.key(seed), tuple(sorted(options.items())))


@pytest.fixture(scope="module")
def rollout(lm, prompts):
    return sample(lm, prompts, num_responses=4)


def response(rollout):
    return np.asarray(rollout.tokens)[:, PROMPT:], np.asarray(rollout.mask)[:, PROMPT:]


def assert_same(actual, expected):
    for name in ("tokens", "mask", "group"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_allclose(actual.sampler_log_probs, expected.sampler_log_probs, **TOLERANCE)


# --- What a rollout is ------------------------------------------------------------------------------------------------


def test_responses_end_with_eos_and_nothing_follows(rollout):
    tokens, mask = response(rollout)
    ended = 0
    for row, row_mask, log_probs in zip(tokens, mask, np.asarray(rollout.sampler_log_probs), strict=True):
        ends = np.flatnonzero((row == EOS) & row_mask)
        length = ends[0] + 1 if ends.size else RESPONSE
        ended += ends.size
        np.testing.assert_array_equal(row_mask, np.arange(RESPONSE) < length)
        np.testing.assert_array_equal(row[length:], PAD)
        np.testing.assert_array_equal(log_probs[length:], 0.0)
        assert (log_probs[:length] < 0).all()
    assert 0 < ended < len(tokens)  # some end, some are cut off


def test_each_of_several_tokens_ends_a_response(lm, prompts, rollout):
    tokens, mask = response(rollout)
    other = int(np.bincount(tokens[mask & (tokens != EOS)]).argmax())
    several = sample(lm, prompts, num_responses=4, eos_id=(EOS, other))
    ended = set()
    for row, row_mask, free, free_mask in zip(*response(several), tokens, mask, strict=True):
        ends = np.flatnonzero(((free == EOS) | (free == other)) & free_mask)
        length = ends[0] + 1 if ends.size else RESPONSE
        np.testing.assert_array_equal(row_mask, np.arange(RESPONSE) < length)
        np.testing.assert_array_equal(row[:length], free[:length])
        ended |= {int(free[length - 1])} if ends.size else set()
    assert ended == {EOS, other}
    assert_same(sample(lm, prompts, num_responses=4, eos_id=(EOS,)), rollout)


def test_rows_without_a_token_are_never_sampled_and_have_no_probability(lm, prompts):
    module, params = lm
    unused = ((3, 5), (11, VOCAB))
    narrow = module.clone(config=dataclasses.replace(module.config, unused_rows=unused)), params
    rollout = sample(narrow, prompts, num_responses=16)
    tokens, mask = response(rollout)
    free, free_mask = response(sample(lm, prompts, num_responses=16))
    without = {3, 4, *range(11, VOCAB)}
    assert without & set(free[free_mask].tolist())
    assert not without & set(tokens[mask].tolist())
    learned = response_log_probs(*narrow, rollout.tokens, rollout.mask, prompt_length=PROMPT)
    np.testing.assert_allclose(np.asarray(learned)[mask], np.asarray(rollout.sampler_log_probs)[mask], **TOLERANCE)
    logits = np.asarray(apply(narrow[0], {"params": params}, rollout.tokens, rollout.mask), np.float64)
    total = np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    kept = [i for i in range(VOCAB) if i not in without]
    np.testing.assert_allclose(np.exp(logits - logits.max(-1, keepdims=True))[..., kept].sum(-1), total, rtol=1e-6)


def test_prompts_come_back_unchanged(prompts, rollout):
    np.testing.assert_array_equal(rollout.tokens[:, :PROMPT], np.repeat(prompts.tokens, 4, axis=0))
    np.testing.assert_array_equal(rollout.mask[:, :PROMPT], np.repeat(prompts.mask, 4, axis=0))
    np.testing.assert_array_equal(rollout.group, np.repeat(np.arange(BATCH), 4))


def test_the_same_key_gives_the_same_responses_and_another_key_others(lm, prompts):
    first = sample(lm, prompts, seed=1)
    assert_same(sample(lm, prompts, seed=1), first)
    assert not np.array_equal(sample(lm, prompts, seed=2).tokens, first.tokens)


# --- What must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [EOS, 5])
def test_pad_id_changes_nothing_but_the_filling(lm, prompts, rollout, pad_id):
    other_prompts = prompts.replace(tokens=jnp.where(prompts.mask, prompts.tokens, pad_id))
    other = sample(lm, other_prompts, num_responses=4, pad_id=pad_id)
    np.testing.assert_array_equal(other.mask, rollout.mask)
    mask = np.asarray(rollout.mask)
    np.testing.assert_array_equal(np.asarray(other.tokens)[mask], np.asarray(rollout.tokens)[mask])
    assert (np.asarray(other.tokens)[~mask] == pad_id).all()
    np.testing.assert_allclose(other.sampler_log_probs, rollout.sampler_log_probs, **TOLERANCE)
    module, params = lm
    log_probs = [response_log_probs(module, params, r.tokens, r.mask, prompt_length=PROMPT) for r in (rollout, other)]
    real = response(rollout)[1]
    np.testing.assert_allclose(np.asarray(log_probs[0])[real], np.asarray(log_probs[1])[real], **TOLERANCE)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_early_exit_changes_nothing(lm, prompts, penalty):
    options = {"sampling": Sampling(repetition_penalty=penalty), "response_length": 40}
    short, full = (sample(lm, prompts, early_exit=early_exit, **options) for early_exit in (True, False))
    assert np.asarray(short.mask)[:, PROMPT:].sum(-1).max() < 40  # all ended: the loop did exit early
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loop_ends_when_every_row_has():
    module, variables = make_lm(tiny_config(vocab_size=VOCAB))
    steps = []

    class Counted(type(module)):
        def decode(self, *args):
            jax.debug.callback(lambda: steps.append(1))
            return super().decode(*args)

    prompts = prompt_batch(np.random.default_rng(0), 3, PROMPT, VOCAB)
    greedy = {"sampling": Sampling(temperature=0.0), "pad_id": PAD, "response_length": 9}
    first = sample((module, variables["params"]), prompts, eos_id=EOS, **greedy).tokens[:, PROMPT:]
    same = prompts.replace(tokens=jnp.tile(prompts.tokens[:1], (3, 1)), mask=jnp.tile(prompts.mask[:1], (3, 1)))
    sample((Counted(module.config), variables["params"]), same, eos_id=int(first[0, 0]), **greedy)
    jax.effects_barrier()
    assert len(steps) == 1


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_responses_of_one_prompt_share_its_prefill(prompts, scan_layers):
    module, variables = make_lm(tiny_config(vocab_size=VOCAB, scan_layers=scan_layers))
    lm = module, variables["params"]
    repeated = PromptBatch(*(jnp.repeat(x, 3, axis=0) for x in (prompts.tokens, prompts.mask, prompts.group)))
    together = sample(lm, prompts, num_responses=3)
    assert_same(together, sample(lm, repeated))
    assert len({tuple(row) for row in np.asarray(together.tokens)}) > BATCH  # the responses of a prompt differ


@pytest.mark.parametrize("extra", [1, 4])
def test_more_left_padding_changes_nothing(lm, prompts, extra):
    pad = ((0, 0), (extra, 0))
    wider = prompts.replace(tokens=jnp.pad(prompts.tokens, pad, constant_values=7), mask=jnp.pad(prompts.mask, pad))
    expected, actual = sample(lm, prompts), sample(lm, wider)
    np.testing.assert_array_equal(actual.tokens[:, PROMPT + extra :], expected.tokens[:, PROMPT:])
    np.testing.assert_allclose(actual.sampler_log_probs, expected.sampler_log_probs, **TOLERANCE)


def test_a_prompt_of_padding_leaves_other_rows_alone(lm, prompts):
    greedy = Sampling(temperature=0.0)
    empty = prompts.replace(mask=prompts.mask.at[1].set(False))
    expected, actual = sample(lm, prompts, sampling=greedy), sample(lm, empty, sampling=greedy)
    assert np.isfinite(actual.sampler_log_probs).all()
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(actual.tokens[others], expected.tokens[others])


@pytest.mark.slow
def test_parameters_gathered_once_give_the_same_responses_and_are_not_gathered_again(prompts, monkeypatch):
    options = {"response_length": RESPONSE, "eos_id": EOS, "pad_id": PAD, "sampling": Sampling()}
    rollouts, moved = [], []
    tensor, decode = make_mesh((1, 4, 2)), make_mesh((1, 4, 1), decode=2)
    cases = (
        (False, tensor, "cpu"),
        (False, tensor, "gpu"),
        (True, tensor, "cpu"),
        (True, decode, "cpu"),
        (True, decode, "gpu"),
    )
    for gather, mesh, platform in cases:
        monkeypatch.setattr(generating, "platform", lambda platform=platform: platform)
        run.clear_cache()
        with jax.set_mesh(mesh):
            config = tiny_config(vocab_size=18, scan_layers=True, gather_to_decode=gather, dtype="bfloat16")
            module = CausalLM(config)
            init = functools.partial(module.init, tokens=prompts.tokens, mask=prompts.mask)
            arguments = init_sharded(init, mesh, jax.random.key(0))["params"], prompts, jax.random.key(0)
            program = run.lower(module, *arguments, tuple(options.items())).compile()
            rollouts.append(program(*arguments))
            found = find_collectives(Module(program.as_text()), mesh.shape)
            moved.append({c.axes for c in found if c.kind != "all-reduce" and c.times >= RESPONSE})
    for other in rollouts[1:]:
        np.testing.assert_array_equal(other.tokens, rollouts[0].tokens)
        np.testing.assert_allclose(other.sampler_log_probs, rollouts[0].sampler_log_probs, rtol=1e-2, atol=1e-2)
    assert ("fsdp",) in moved[0]
    assert ("fsdp",) in moved[1]  # the copy of a GPU is split as the parameters are
    assert moved[2:] == [{("tensor",)}, {("decode",)}, {("decode",)}]


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    "changes", [{}, {"windows": (5, None)}, {"positions": "alibi"}], ids=["full", "window", "alibi"]
)
def test_a_cache_that_is_read_as_far_as_it_may_be_filled_gives_the_same(prompts, monkeypatch, scan_layers, changes):
    module, variables = make_lm(tiny_config(vocab_size=VOCAB, scan_layers=scan_layers, num_layers=2, **changes))
    options = {"response_length": RESPONSE, "eos_id": EOS, "pad_id": PAD, "sampling": Sampling()}
    arguments = module, perturbed(variables)["params"], prompts, jax.random.key(0)
    expected = run(*arguments, tuple(options.items()))
    monkeypatch.setattr(generating, "SEGMENT", 3)
    assert generating.segments(RESPONSE) == [3, 6, 9, 12]
    in_segments = jax.jit(lambda params, prompts, key: generate(module, params, prompts, key, **options))
    assert_same(in_segments(*arguments[1:]), expected)


@pytest.mark.parametrize(
    ("scan_layers", "windows", "slots"),
    [
        (False, (5, None), [5, PROMPT + RESPONSE]),
        (False, (9, 5), [9, 5]),
        (True, (5, 5), [5]),
        (True, (5, None), [PROMPT + RESPONSE]),
    ],
)
def test_a_window_keeps_its_own_columns_only(prompts, monkeypatch, scan_layers, windows, slots):
    config = tiny_config(vocab_size=VOCAB, scan_layers=scan_layers, num_layers=2, windows=windows, positions="alibi")
    module, variables = make_lm(config)
    monkeypatch.setattr(generating, "SEGMENT", 3)
    kept = []

    def grown(*arguments):
        kept.append(growing(*arguments))
        return kept[-1]

    growing = generating.grown
    monkeypatch.setattr(generating, "grown", grown)
    options = {"response_length": RESPONSE, "eos_id": EOS, "pad_id": PAD, "sampling": Sampling()}
    params = perturbed(variables)["params"]
    in_rings = jax.jit(functools.partial(generate, module, **options))(params, prompts, jax.random.key(0))
    assert {x.shape[-2] for x in jax.tree.leaves(kept[-1])} == set(slots)
    log_probs = response_log_probs(module, params, in_rings.tokens, in_rings.mask, prompt_length=PROMPT)
    mask = response(in_rings)[1]
    np.testing.assert_allclose(np.asarray(in_rings.sampler_log_probs)[mask], np.asarray(log_probs)[mask], **TOLERANCE)


@pytest.mark.parametrize(("kept", "trunk"), [(True, 1), (False, 0)], ids=["a copy", "no copy"])
def test_on_a_gpu_layers_are_compiled_one_by_one_and_give_the_same_responses(prompts, monkeypatch, kept, trunk):
    config = tiny_config(vocab_size=VOCAB, scan_layers=True, num_layers=3 + trunk, merge_to_decode=kept, trunk=trunk)
    module, variables = make_lm(config)
    options = {"response_length": RESPONSE, "eos_id": EOS, "pad_id": PAD, "sampling": Sampling()}
    arguments = perturbed(variables)["params"], prompts, jax.random.key(0)

    def traced():
        return jax.jit(functools.partial(generate, module, **options)).trace(*arguments)

    scanned = traced()
    monkeypatch.setattr(generating, "platform", lambda: "gpu")
    one_by_one, unroll = traced(), "unroll=3"
    assert unroll not in str(scanned.jaxpr)
    assert (unroll in str(one_by_one.jaxpr)) != kept
    assert ("length=" in str(one_by_one.jaxpr)) != kept  # a scan
    assert_same(*(program.lower().compile()(*arguments) for program in (one_by_one, scanned)))


def test_loops_over_a_response_are_few_and_long():
    assert generating.segments(64) == [64]
    assert generating.segments(200) == [67, 134, 200]
    assert generating.segments(2048) == [512, 1024, 1536, 2048]


# --- Log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_the_sampler_are_those_of_the_learner(prompts, temperature, scan_layers):
    module, variables = make_lm(tiny_config(vocab_size=VOCAB, scan_layers=scan_layers))
    rollout = sample((module, variables["params"]), prompts, sampling=Sampling(temperature=temperature))
    log_probs = response_log_probs(
        module, variables["params"], rollout.tokens, rollout.mask, prompt_length=PROMPT, temperature=temperature
    )
    mask = response(rollout)[1]
    np.testing.assert_allclose(np.asarray(rollout.sampler_log_probs)[mask], np.asarray(log_probs)[mask], **TOLERANCE)


def test_greedy_tokens_are_the_most_probable_of_the_full_forward(lm, prompts):
    module, params = lm
    rollout = sample(lm, prompts, sampling=Sampling(temperature=0.0))
    logits = apply(module, {"params": params}, rollout.tokens, rollout.mask)[:, PROMPT - 1 : -1]
    tokens, mask = response(rollout)
    np.testing.assert_array_equal(tokens[mask], np.asarray(logits.argmax(-1))[mask])
    log_probs = ops.token_log_probs(logits, rollout.tokens[:, PROMPT:])
    np.testing.assert_allclose(np.asarray(rollout.sampler_log_probs)[mask], np.asarray(log_probs)[mask], **TOLERANCE)


def test_repetition_penalty_counts_prompt_and_response_but_not_padding(lm, prompts):
    """The penalty is so large that a token that occurred is never chosen again."""
    rollout = sample(lm, prompts, sampling=Sampling(temperature=0.0, repetition_penalty=1e6), response_length=5)
    for tokens, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True):
        real = tokens[mask]
        chosen = real[mask[:PROMPT].sum() :]
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(real[: -len(chosen)])


def test_padding_tokens_are_not_penalised(lm, prompts):
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    expected = sample(lm, prompts, sampling=sampling)
    chosen = expected.tokens[:, PROMPT : PROMPT + 1]  # what would not be chosen again if padding counted
    filled = prompts.replace(tokens=jnp.where(prompts.mask, prompts.tokens, chosen))
    actual = sample(lm, filled, sampling=sampling)
    np.testing.assert_array_equal(actual.tokens[:, PROMPT:], expected.tokens[:, PROMPT:])
    assert not prompts.mask.all()


def test_decoding_compiles_once_for_all_steps_and_keys(lm, prompts):
    sample(lm, prompts, seed=1)
    with compilations() as found:
        sample(lm, prompts, seed=2)
    assert not found
