"""The contract of a model: what a token attends to, and what layout, remat and cache must not change."""

import re
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.models import build_model, unstack_layers
from jaxllm.parallel.sharding import path_name


def random_params(model, seed=0):
    """Initial parameters plus noise, since norms of one and biases of zero would hide mistakes."""

    @jax.jit
    def init(key):
        leaves, structure = jax.tree.flatten(model.init(key))
        keys = jax.random.split(key, len(leaves))
        noise = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        return structure.unflatten([leaf + extra for leaf, extra in zip(leaves, noise, strict=True)])

    return init(jax.random.key(seed))


def random_tokens(config, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def projection(model, tokens, **kwargs):
    """A scalar function of the parameters that depends on every hidden state, to differentiate."""
    weights = jax.random.normal(jax.random.key(7), (*tokens.shape, model.config.width))
    return lambda params: (model.apply(params, tokens, **kwargs).hidden * weights).sum()


def assert_trees_close(actual, expected, rtol=1e-4):
    """Leaf by leaf, to rtol of the leaf's largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(path, a, b):
        scale = np.abs(b).max()
        assert scale > 0, f"{path_name(path)} is all zero: the comparison shows nothing"
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=path_name(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


# What a token attends to


def dependencies(model, params, tokens_T, **kwargs):
    """[T, S] bool: does the state at t depend on the token at s? The row's tokens must all differ."""

    def states(table):
        params_with_table = {**params, "embed": {"table": table}}
        return model.apply(params_with_table, tokens_T[None], **kwargs).hidden[0].sum(axis=-1)

    influence_TVD = jax.jit(jax.jacrev(states))(params["embed"]["table"])
    return (influence_TVD != 0).any(axis=-1)[:, tokens_T]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_depends_on_itself_and_the_past_of_its_own_document(tiny, window, packed):
    model = build_model(
        replace(tiny, num_layers=2, sliding_window=window, layer_pattern=("local" if window else "global",))
    )
    tokens_T = np.random.default_rng(0).permutation(tiny.vocab_size)[:12]
    segments_T = np.array([1] * 5 + [2] * 4 + [3] * 2 + [0]) if packed else np.ones(12, int)
    distance = np.arange(12)[:, None] - np.arange(12)[None]
    one_layer = (distance >= 0) & (distance < (window or 12)) & (segments_T[:, None] == segments_T[None])
    two_layers = one_layer @ one_layer  # a key's state depends on the keys of the layer below
    segment_ids = jnp.asarray(segments_T)[None] if packed else None
    actual = dependencies(model, random_params(model), tokens_T, segment_ids=segment_ids)
    np.testing.assert_array_equal(actual, two_layers)


def test_changing_later_tokens_or_other_documents_changes_no_state_and_no_gradient(tiny):
    model = build_model(tiny)
    params = random_params(model)
    segment_ids = np.array([[1] * 6 + [2] * 10])
    tokens = random_tokens(tiny, 1, 16)
    changed = tokens.copy()
    changed[0, :6] = (changed[0, :6] + 1) % tiny.vocab_size  # another document
    changed[0, 12:] = (changed[0, 12:] + 1) % tiny.vocab_size  # the future

    def states(params, tokens):
        return model.apply(params, tokens, segment_ids=segment_ids).hidden[:, 6:12]

    @jax.jit
    def value_and_gradient(tokens):
        return states(params, tokens), jax.grad(lambda p: jnp.sin(states(p, tokens)).sum())(params)

    jax.tree.map(np.testing.assert_array_equal, value_and_gradient(tokens), value_and_gradient(changed))


def test_packed_documents_equal_documents_alone(tiny):
    model = build_model(tiny)
    params = random_params(model)
    lengths = [70, 5, 40]  # in blocks of 64 queries: across, inside and at the end
    tokens = random_tokens(tiny, 1, sum(lengths))
    segment_ids = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    weights = np.random.default_rng(1).normal(size=(1, sum(lengths), tiny.width)).astype(np.float32)
    starts = np.cumsum([0, *lengths])

    def packed(params):
        hidden = model.apply(params, tokens, positions=positions, segment_ids=segment_ids).hidden
        return (hidden * weights).sum(), hidden

    def alone(params):
        documents = [model.apply(params, tokens[:, start:stop]).hidden for start, stop in pairwise(starts)]
        hidden = jnp.concatenate(documents, axis=1)
        return (hidden * weights).sum(), hidden

    packed_gradient, packed_hidden = jax.jit(jax.grad(packed, has_aux=True))(params)
    gradient, hidden = jax.jit(jax.grad(alone, has_aux=True))(params)
    np.testing.assert_allclose(packed_hidden, hidden, atol=2e-5)
    assert_trees_close(packed_gradient, gradient)


def test_a_fully_padded_row_is_finite_and_leaves_the_others_alone(tiny):
    model = build_model(tiny)
    params = random_params(model)
    tokens = random_tokens(tiny, 2, 9)
    tokens[1] = 0
    segment_ids = np.array([[1] * 9, [0] * 9])
    positions = np.array([np.arange(9), np.zeros(9, int)])

    @jax.jit
    def run(params):
        value, pull_back = jax.vjp(
            lambda p: model.apply(p, tokens, positions=positions, segment_ids=segment_ids).hidden, params
        )
        return value, pull_back(jnp.ones_like(value).at[1].set(0.0))[0]

    hidden, gradient = run(params)
    assert np.isfinite(hidden).all()
    alone = jax.jit(model.apply)(params, tokens[:1]).hidden
    np.testing.assert_allclose(hidden[:1], alone, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# The cache


def test_decoding_token_by_token_equals_the_full_pass(tiny):
    model = build_model(replace(tiny, num_layers=2))
    params = random_params(model)
    tokens = random_tokens(tiny, 2, 10)
    expected = jax.jit(model.apply)(params, tokens)
    assert expected.cache is None
    step = jax.jit(lambda token, t, cache: model.apply(params, token, positions=t, cache=cache))
    cache = model.init_cache(2, 13)
    for t in range(10):
        hidden, cache, _ = step(tokens[:, t : t + 1], np.full((2, 1), t), cache)
        np.testing.assert_allclose(hidden[:, 0], expected.hidden[:, t], atol=1e-5, err_msg=f"position {t}")


@pytest.mark.parametrize("positions", [None, np.tile(np.arange(8), (3, 1))], ids=["filled", "positions"])
def test_ragged_prompts_prefill_and_decode_like_each_row_alone(tiny, positions):
    model = build_model(replace(tiny, num_layers=2, sliding_window=6, layer_pattern=("local",)))
    params = random_params(model)
    tokens = random_tokens(tiny, 3, 12)
    full = jax.jit(model.apply)(params, tokens).hidden
    lengths = np.array([3, 8, 5])
    prompts = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], 60)  # pads on the right: any token

    @jax.jit
    def run(tokens, positions, cache):
        return model.apply(params, tokens, positions=positions, cache=cache)

    hidden, cache, _ = run(prompts, positions, model.init_cache(3, 12))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], atol=1e-5)
    for step in range(4):
        now = lengths + step
        hidden, cache, _ = run(tokens[np.arange(3), now][:, None], now[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], full[np.arange(3), now], atol=1e-5, err_msg=f"step {step}")


def test_a_cache_has_keys_and_values_per_layer_in_the_compute_dtype_or_the_given_one(tiny):
    model = build_model(replace(tiny, compute_dtype="bfloat16"))
    cache = model.init_cache(5, 17)
    assert len(cache) == tiny.num_layers
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(5, tiny.num_kv_heads, 17, tiny.head_dim)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert model.init_cache(1, 1, jnp.float32)[0].keys_BKSh.dtype == jnp.float32


# Layout, remat, dtype


def test_scanned_equals_unrolled(tiny):
    scanned, unrolled = build_model(tiny), build_model(replace(tiny, scan_layers=False))
    assert jax.tree.map(jnp.shape, jax.eval_shape(scanned.init, jax.random.key(0))) == jax.tree.map(
        jnp.shape, jax.eval_shape(unrolled.init, jax.random.key(0))
    )
    params, tokens = random_params(scanned), random_tokens(tiny, 2, 9)
    loops = [str(jax.make_jaxpr(model.apply)(params, tokens)).count("scan[") for model in (scanned, unrolled)]
    assert loops == [1, 0]
    one, other = (
        jax.jit(jax.value_and_grad(projection(model, tokens)))(params) for model in (scanned, unrolled)
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert_trees_close(one[1], other[1])


def test_unstacked_parameters_give_the_same_values_and_gradients(tiny):
    model = build_model(tiny)
    params, tokens = random_params(model), random_tokens(tiny, 2, 9)
    unstacked = unstack_layers(params)
    assert len(unstacked["blocks"]) == tiny.num_layers
    assert unstack_layers(unstacked) is unstacked
    loss = projection(model, tokens)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    direct_value, direct = jax.jit(jax.value_and_grad(loss))(unstacked)
    through = jax.jit(jax.grad(lambda p: loss(unstack_layers(p))))(params)
    np.testing.assert_allclose(direct_value, value, rtol=1e-5)
    assert_trees_close(direct, unstack_layers(gradient))
    assert_trees_close(through, gradient)


def saved_bytes(model, params, tokens):
    """The bytes that a forward pass saves for the backward pass, parameters included."""
    pull_back = jax.eval_shape(lambda p: jax.vjp(projection(model, tokens), p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_each_remat_policy_saves_less_than_the_one_before(tiny, scan_layers):
    tokens = random_tokens(tiny, 4, 32)
    saved = []
    for remat in ("none", "dots", "attention", "full"):
        model = build_model(replace(tiny, remat=remat, scan_layers=scan_layers))
        saved.append(saved_bytes(model, jax.eval_shape(model.init, jax.random.key(0)), tokens))
    assert saved[0] > 1.2 * saved[1] > 1.2**2 * saved[2] > 1.05 * 1.2**2 * saved[3], saved
    one_attention_output = 4 * 32 * tiny.num_heads * tiny.head_dim * 4
    assert saved[2] - saved[3] == tiny.num_layers * one_attention_output


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_remat_changes_no_gradient(tiny, remat):
    params, tokens = random_params(build_model(tiny)), random_tokens(tiny, 2, 9)
    plain, rematerialized = (
        jax.jit(jax.grad(projection(build_model(replace(tiny, remat=policy)), tokens)))(params)
        for policy in ("none", remat)
    )
    assert_trees_close(rematerialized, plain, rtol=1e-5)


def test_noise_is_added_to_the_embedded_tokens(tiny):
    model, tokens = build_model(tiny), random_tokens(tiny, 2, 12)
    params, other = random_params(model), random_tokens(tiny, 2, 12, seed=1)
    table, apply = params["embed"]["table"], jax.jit(model.apply)
    replaced = apply(params, tokens, noise=table[other] - table[tokens]).hidden
    np.testing.assert_allclose(replaced, apply(params, other).hidden, rtol=1e-4, atol=1e-4)
    unchanged = apply(params, tokens, noise=jnp.zeros((2, 12, tiny.width))).hidden
    np.testing.assert_allclose(unchanged, apply(params, tokens).hidden, rtol=1e-5, atol=1e-6)


def test_noise_keeps_the_compute_dtype(tiny):
    model = build_model(replace(tiny, compute_dtype="bfloat16"))
    tokens = random_tokens(tiny, 2, 12)
    noise = jnp.ones((2, 12, tiny.width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    output = jax.eval_shape(lambda params: model.apply(params, tokens, noise=noise), params)
    assert output.hidden.dtype == jnp.bfloat16


def test_bfloat16_compute_keeps_float32_parameters_and_gradients(tiny):
    exact, model = build_model(tiny), build_model(replace(tiny, compute_dtype="bfloat16"))
    params, tokens = random_params(model), random_tokens(tiny, 2, 9)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = jax.jit(model.apply)(params, tokens).hidden
    assert hidden.dtype == model.head(params).dtype == jnp.bfloat16
    logits = jax.jit(model.logits)(params, tokens)
    assert logits.dtype == jnp.float32
    expected = jax.jit(exact.logits)(params, tokens)
    assert 1e-6 < np.abs(logits - expected).max() / np.abs(expected).max() < 0.03
    gradient = jax.jit(jax.grad(projection(model, tokens)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    expected = jax.jit(jax.grad(projection(exact, tokens)))(params)
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradient, expected)
    assert max(jax.tree.leaves(errors)) < 0.1


def test_parameters_are_stored_in_param_dtype(tiny):
    config = replace(tiny, param_dtype="bfloat16", qkv_bias=True, qk_norm="head", tie_embeddings=False)
    params = jax.eval_shape(build_model(config).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


# Heads, biases, initial values


def test_the_gradient_of_the_embedding_adds_up_in_float32(tiny):
    model = build_model(replace(tiny, compute_dtype="bfloat16", tie_embeddings=False))
    params = jax.eval_shape(model.init, jax.random.key(0))
    table = jnp.zeros(params["embed"]["table"].shape)
    tokens = jnp.full((2, 400), 7)

    def total(table):
        return model.embed({"embed": {"table": table}}, tokens).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(table)[7], 800)  # bfloat16 stays at 256


def test_tied_head_is_the_embedding_and_untied_one_its_own_matrix(tiny):
    tied, untied = build_model(tiny), build_model(replace(tiny, tie_embeddings=False))
    params = random_params(untied)
    tokens = random_tokens(tiny, 1, 4)
    assert set(random_params(tied)) == {"embed", "blocks", "final_norm"}
    np.testing.assert_array_equal(untied.head(params), params["head"]["kernel"])
    np.testing.assert_array_equal(tied.head(params), params["embed"]["table"].T)
    hidden = jax.jit(untied.apply)(params, tokens).hidden
    for model in (tied, untied):
        logits = jax.jit(model.logits)(params, tokens)
        np.testing.assert_allclose(logits, hidden @ model.head(params), atol=1e-4)
        np.testing.assert_allclose(model.unembed(params, hidden[:, -1]), logits[:, -1], atol=1e-5)


def test_logit_softcap_bounds_the_logits(tiny):
    plain, capped = build_model(tiny), build_model(replace(tiny, logit_softcap=1.0))
    params, tokens = random_params(plain), random_tokens(tiny, 1, 6)
    logits = jax.jit(plain.logits)(params, tokens)
    assert np.abs(logits).max() > 2
    np.testing.assert_allclose(jax.jit(capped.logits)(params, tokens), np.tanh(logits), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "where"),
    [
        ("qkv_bias", {"attention/query", "attention/key", "attention/value"}),
        ("output_bias", {"attention/output"}),
        ("mlp_bias", {"mlp/gate", "mlp/up", "mlp/down"}),
    ],
)
def test_a_bias_is_where_its_field_says_and_is_used(tiny, field, where):
    model = build_model(replace(tiny, **{field: True}))
    params, tokens = random_params(model), random_tokens(tiny, 1, 6)
    gradient = jax.jit(jax.grad(projection(model, tokens)))(params)
    found = {
        f"{part}/{name}": leaves["bias"]
        for part in ("attention", "mlp")
        for name, leaves in gradient["blocks"][part].items()
        if "bias" in leaves
    }
    assert set(found) == where
    used = {name for name, bias in found.items() if np.abs(bias).max() > 1e-3}
    assert used == where


@pytest.mark.parametrize("qk_norm", ["none", "head", "all_heads"])
def test_qk_norm_removes_the_scale_of_queries_and_keys(tiny, qk_norm):
    model = build_model(replace(tiny, qk_norm=qk_norm))
    params, tokens = random_params(model), random_tokens(tiny, 1, 6)
    attention = params["blocks"]["attention"]
    larger = {name: {"kernel": 5 * attention[name]["kernel"]} for name in ("query", "key")}
    scaled = {**params, "blocks": {**params["blocks"], "attention": {**attention, **larger}}}
    hidden, of_scaled = (jax.jit(model.apply)(p, tokens).hidden for p in (params, scaled))
    assert np.allclose(hidden, of_scaled, atol=1e-3) == (qk_norm != "none")


def test_initial_layers_differ_and_the_residual_stream_keeps_its_size(tiny):
    config = replace(tiny, width=128, mlp_width=256, head_dim=32, num_layers=4)
    params = jax.jit(build_model(config).init)(jax.random.key(0))
    blocks = params["blocks"]
    assert not np.allclose(blocks["mlp"]["up"]["kernel"][0], blocks["mlp"]["up"]["kernel"][1])
    deviations = {
        "embed": (params["embed"]["table"], 0.02),
        "up": (blocks["mlp"]["up"]["kernel"], 128**-0.5),
        # 2 * num_layers outputs are added to the stream.
        "down": (blocks["mlp"]["down"]["kernel"], (256 * 2 * 4) ** -0.5),
        "output": (blocks["attention"]["output"]["kernel"], (128 * 2 * 4) ** -0.5),
    }
    for name, (kernel, expected) in deviations.items():
        assert np.std(kernel) == pytest.approx(expected, rel=0.05), name


# Invalid configs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_kv_heads", 3),
        ("num_kv_heads", 0),
        ("head_dim", 7),
        ("head_dim", 0),
        ("num_layers", 0),
        ("num_heads", 0),
        ("width", -1),
        ("mlp_width", 0),
        ("vocab_size", 0),
        ("max_length", 0),
        ("activation", "relu"),
        ("mlp", "wide"),
        ("norm", "batch"),
        ("norm_position", "none"),
        ("qk_norm", "all"),
        ("position_embedding", "alibi"),
        ("layer_pattern", ()),
        ("layer_pattern", ("global", "far")),
        ("sliding_window", 7),
        ("remat", "some"),
        ("attention", "flash"),
        ("compute_dtype", "int8"),
        ("param_dtype", "float64"),
        ("sliding_window", 0),
        ("attention_softcap", 0.0),
        ("logit_softcap", -1.0),
        ("rope_theta", 0.0),
        ("norm_epsilon", -1e-6),
    ],
)
def test_an_invalid_field_is_named(tiny, field, value):
    with pytest.raises(ConfigError, match=re.escape(f"model.{field}={value!r}")):
        build_model(replace(tiny, **{field: value}))


def test_an_unknown_rope_scaling_is_named(tiny):
    with pytest.raises(
        ConfigError, match=r"model\.rope_scaling\.kind='dynamic'.*choose one of none, linear, llama3, yarn"
    ):
        build_model(replace(tiny, rope_scaling=replace(tiny.rope_scaling, kind="dynamic")))


def test_cudnn_supports_no_softcap_and_no_float32(tiny):
    with pytest.raises(
        ConfigError, match=r"model\.attention=cudnn does not support model\.attention_softcap"
    ):
        build_model(replace(tiny, attention="cudnn", compute_dtype="bfloat16", attention_softcap=30.0))
    with pytest.raises(ConfigError, match=r"model\.compute_dtype=float32; use bfloat16 or float16"):
        build_model(replace(tiny, attention="cudnn"))
