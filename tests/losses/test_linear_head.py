"""The output head inside the loss: equal to the dense form, without a [B, T, V] array, also on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    token_entropy,
    token_log_probs,
)

GIB = 2**30


def linear_arrays(batch=2, length=6, width=5, vocab_size=43):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(batch, length, width)), rng.normal(size=(width, vocab_size))
    targets = rng.integers(0, vocab_size, (batch, length))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets)


def dense_logits(hidden, head, softcap):
    logits = hidden @ head
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("block_size", [None, 1, 2, 4, 5, 6, 100])
def test_linear_log_probs_and_entropy_equal_the_dense_ones(block_size, softcap):
    """V = 43 gives up to 5 slices of 8 columns and 3 that remain; 4 and 5 do not divide T = 6."""
    hidden, head, targets = linear_arrays()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *targets.shape)), jnp.float32)

    def score(log_probs, entropy):
        return (weights[0] * log_probs + weights[1] * entropy).sum(), (log_probs, entropy)

    def linear(hidden, head):
        knobs = {"temperature": 0.7, "softcap": softcap, "block_size": block_size}
        return score(*linear_token_log_probs(hidden, head, targets, **knobs))

    def dense(hidden, head):
        logits = dense_logits(hidden, head, softcap)
        return score(
            token_log_probs(logits, targets, temperature=0.7), token_entropy(logits, temperature=0.7)
        )

    actual = jax.jit(jax.value_and_grad(linear, (0, 1), has_aux=True))(hidden, head)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


@pytest.mark.parametrize("block_size", [2, None])
def test_an_entropy_without_gradient_is_the_same_constant(block_size):
    hidden, head, targets = linear_arrays()

    def total(hidden, entropy_weight, **options):
        found = linear_token_log_probs(hidden, head, targets, block_size=block_size, **options)
        return (found[0] + entropy_weight * found[1]).sum(), found

    score = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="entropy_gradient")
    (_, constant), gradient = score(hidden, 3.0, entropy_gradient=False)
    (_, expected), of_log_probs = score(hidden, 0.0)
    jax.tree.map(np.testing.assert_array_equal, constant, expected)
    np.testing.assert_allclose(gradient, of_log_probs, atol=1e-5)


@pytest.mark.parametrize("block_size", [2, None])
def test_linear_cross_entropy_equals_the_dense_one(block_size):
    hidden, head, targets = linear_arrays()
    mask, knobs = (
        jnp.array([[1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0]]),
        {"label_smoothing": 0.1, "z_loss": 0.01},
    )

    def linear(hidden, head):
        loss, metrics = linear_cross_entropy(hidden, head, targets, mask, block_size=block_size, **knobs)
        return loss.mean, (loss, metrics)

    def dense(hidden, head):
        loss, metrics = cross_entropy(hidden @ head, targets, mask, **knobs)
        return loss.mean, (loss, metrics)

    actual = jax.jit(jax.value_and_grad(linear, (0, 1), has_aux=True))(hidden, head)
    expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


def test_linear_functions_map_over_batches():
    hidden, head, targets = linear_arrays()
    one = lambda h, t: linear_token_log_probs(h[None], head, t[None], block_size=2)  # noqa: E731
    mapped = jax.vmap(one)(hidden, targets)
    whole = linear_token_log_probs(hidden, head, targets, block_size=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=1e-5), mapped, whole)


def test_mixed_precision_is_promoted_and_gradients_keep_their_types():
    hidden, head, targets = linear_arrays()
    narrow = hidden.astype(jnp.bfloat16)
    loss = lambda h, w: linear_cross_entropy(h, w, targets, jnp.ones(targets.shape), block_size=2)[0].mean  # noqa: E731
    gradients = jax.grad(loss, (0, 1))(narrow, head)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    expected = jax.grad(loss, (0, 1))(narrow.astype(jnp.float32), head)
    np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-5, atol=1e-7)


def test_a_head_of_another_width_is_an_error():
    hidden, head, targets = linear_arrays()
    with pytest.raises(ValueError, match=r"head must be \[D, V\] with the D of hidden, 5; got \(43, 5\)"):
        linear_token_log_probs(hidden, head.T, targets)


def test_an_empty_block_is_an_error():
    with pytest.raises(ValueError, match="block_size=0"):
        linear_token_log_probs(*linear_arrays(), block_size=0)


def linear(hidden, head, targets, mask, block_size=None):
    return linear_cross_entropy(hidden, head, targets, mask, block_size=block_size)[0].mean


def dense(hidden, head, targets, mask):
    return cross_entropy(hidden @ head, targets, mask)[0].mean


def compile_gradient(loss, batch, length, width, vocab_size, dtype=jnp.float32, shardings=(None,) * 3):
    """Compiled from shapes alone: no array is allocated."""
    of_hidden, of_head, of_tokens = shardings

    def array(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arguments = (
        array((batch, length, width), dtype, of_hidden),
        array((width, vocab_size), dtype, of_head),
        array((batch, length), jnp.int32, of_tokens),
        array((batch, length), jnp.bool_, of_tokens),
    )
    out = None if of_head is None else (of_hidden, of_head)
    return jax.jit(jax.grad(loss, (0, 1)), out_shardings=out).lower(*arguments).compile()


def temporary_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def has_shape_of_logits(compiled, batch, length, vocab_size) -> bool:
    shapes = rf"\[({batch},{length}|{batch * length}),{vocab_size}\]"
    return re.search(shapes, compiled.as_text()) is not None


def test_the_logits_never_exist_whole():
    """The compiled gradient has no array of B * T * V elements, and its temporaries are a fraction of one."""
    batch, length, width, vocab_size = 2, 512, 16, 4096
    sizes = (batch, length, width, vocab_size)
    logits_bytes = 4 * batch * length * vocab_size
    whole = compile_gradient(dense, *sizes)
    assert has_shape_of_logits(whole, batch, length, vocab_size)
    assert temporary_bytes(whole) > logits_bytes
    cut = compile_gradient(lambda *a: linear(*a, block_size=64), *sizes)
    assert not has_shape_of_logits(cut, batch, length, vocab_size)
    assert temporary_bytes(cut) < logits_bytes / 2


def test_scoring_cuts_the_logits_too():
    """So does linear_token_log_probs, with the entropy in the gradient."""
    batch, length, width, vocab_size = 2, 512, 16, 4096

    def score(hidden, head, targets, mask):
        log_probs, entropy = linear_token_log_probs(hidden, head, targets, block_size=64)
        return ((log_probs + entropy) * mask).sum()

    compiled = compile_gradient(score, batch, length, width, vocab_size)
    assert temporary_bytes(compiled) < 2 * batch * length * vocab_size


def test_memory_follows_the_block_size():
    sizes = (2, 1024, 16, 8191)  # no width of a slice divides V
    bytes_of = {
        n: temporary_bytes(compile_gradient(lambda *a, n=n: linear(*a, block_size=n), *sizes))
        for n in (32, 256)
    }
    assert bytes_of[32] < bytes_of[256] / 3


def test_a_large_model_fits_by_default():
    """B = 4, T = 2048, V = 151,936, D = 1024 in bfloat16: dense temporaries take 10 to 19 GiB."""
    compiled = compile_gradient(linear, 4, 2048, 1024, 151_936, jnp.bfloat16)
    assert temporary_bytes(compiled) <= 1.5 * GIB


def mesh_of(fsdp, tensor):
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shardings_on(mesh):
    specs = PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec("fsdp")
    return [NamedSharding(mesh, spec) for spec in specs]


def collective_sizes(compiled) -> list[int]:
    """Elements of each result of a collective operation."""
    pattern = r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    return [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(pattern, compiled.as_text())]


def test_a_large_model_fits_on_a_mesh():
    """fsdp 4 x tensor 2: under half of the dense form's memory per device; the head is gathered in slices."""
    shardings = shardings_on(mesh_of(4, 2))
    sizes = (8, 2048, 1024, 151_936, jnp.bfloat16)
    cut, whole = (compile_gradient(loss, *sizes, shardings=shardings) for loss in (linear, dense))
    assert temporary_bytes(cut) < temporary_bytes(whole) / 2
    assert max(collective_sizes(cut)) < 1024 * 151_936 / 8 < max(collective_sizes(whole))


@pytest.mark.parametrize("vocab_size", [128, 131])
def test_on_a_mesh_the_numbers_are_the_same(vocab_size):
    """131 is prime: GSPMD then does not shard V, and the columns that remain still count."""
    mesh = mesh_of(2, 4)
    by_batch, of_head, by_row = shardings_on(mesh)
    if vocab_size % 4:
        of_head = NamedSharding(mesh, PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(4, 6, 8)), rng.normal(size=(8, vocab_size))
    targets, mask = rng.integers(0, vocab_size, (4, 6)), rng.random((4, 6)) < 0.7
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, head)] + [jnp.asarray(targets), jnp.asarray(mask)]
    gradient = jax.value_and_grad(lambda *a: linear(*a, block_size=2), (0, 1))
    placed = jax.device_put(arrays, [by_batch, of_head, by_row, by_row])
    value, (d_hidden, d_head) = jax.jit(gradient, out_shardings=(None, (by_batch, of_head)))(*placed)
    expected_value, expected = jax.jit(gradient)(*arrays)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d_head, expected[1], rtol=1e-4, atol=1e-6)
    assert d_head.sharding == of_head


def test_the_head_s_gradient_is_as_accurate_as_the_dense_form_s():
    """bfloat16 inputs against the truth in float64: the slices add no rounding error.

    Token 0 is every target, so that the other columns are sums of small probabilities over all tokens.
    """
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 256, 32)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(32, 512)) / 8, jnp.bfloat16)
    targets = np.zeros((2, 256), int)
    arguments = (hidden, head, jnp.asarray(targets), jnp.ones(targets.shape))
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    truth = np.einsum("btd,btv->dv", np.asarray(hidden, np.float64), p)[:, 1:] / targets.size

    def error(loss):
        gradient = np.asarray(jax.jit(jax.grad(loss, 1))(*arguments), np.float64)[:, 1:]
        return np.linalg.norm(gradient - truth) / np.linalg.norm(truth)

    assert error(lambda *a: linear(*a, block_size=16)) <= 1.02 * error(dense)


def test_a_very_long_sequence():
    """T = 32,768: bounded memory, and the values of the dense form."""
    sizes = (1, 32_768, 8, 2048)
    compiled = compile_gradient(lambda *a: linear(*a, block_size=1024), *sizes)
    assert temporary_bytes(compiled) < 4 * 32_768 * 2048 / 8
    rng = np.random.default_rng(0)
    batch, length, width, vocab_size = sizes
    hidden, head = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((batch, length, width), (width, vocab_size))
    )
    targets, mask = jnp.asarray(rng.integers(0, vocab_size, (batch, length))), jnp.ones((batch, length), bool)
    actual = compiled(hidden, head, targets.astype(jnp.int32), mask)
    expected = jax.jit(jax.grad(dense, (0, 1)))(hidden, head, targets, mask)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)
