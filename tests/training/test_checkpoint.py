"""What is restored equals what was saved, on any mesh."""

import jax
import jax.numpy as jnp
import pytest
from saved_states import abstract, assert_same, make_state, save, shardings

from jaxllm.errors import CheckpointError
from jaxllm.training.checkpoint import read_arrays
from jaxllm.training.step_folder import find_checkpoint


def test_state_metadata_and_files_are_restored(checkpoints):
    state = make_state(7)
    checkpoints.save(7, state, {"loss": 0.5}, {"tokenizer.model": b"\x00\xff"})
    restored, metadata = checkpoints.restore(None, abstract(make_state(0)))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, state)
    assert metadata == {"loss": 0.5}
    assert (checkpoints.folder / "7/tokenizer.model").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("saved_on", [(8, 1), (1, 1)])
@pytest.mark.parametrize("restored_on", [(8, 1), (2, 4), (1, 1)])
def test_restore_on_another_mesh(checkpoints, saved_on, restored_on):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, saved_on)), {})
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, restored_on)
    )
    restored, _ = checkpoints.restore(3, target)
    assert_same(restored, state)
    assert restored.params["layers"]["query"].sharding == target.params["layers"]["query"].sharding


def test_the_state_may_be_donated_once_save_returns(checkpoints):
    state = make_state(1, width=1 << 16)
    expected = jax.tree.map(jnp.copy, state)
    checkpoints.save(1, state, {})
    params = jax.jit(lambda params: jax.tree.map(lambda x: x * 0 - 1, params), donate_argnums=0)(state.params)
    jax.block_until_ready(params)
    restored, _ = checkpoints.restore(1, abstract(expected))
    assert_same(restored, expected)


def test_parameters_can_be_read_without_the_rest(checkpoints):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, (8, 1))), {})
    checkpoints.wait()
    folder = find_checkpoint(checkpoints.folder)
    assert_same(read_arrays(folder, abstract(state.params), prefix="params"), state.params)
    assert_same(read_arrays(folder, state.key, prefix="key"), state.key)


def test_an_array_without_a_sharding_is_restored_to_the_first_device(checkpoints):
    state = make_state(3)
    checkpoints.save(3, jax.device_put(state, shardings(state, (8, 1))), {})
    restored, _ = checkpoints.restore(3, jax.eval_shape(lambda: state))
    assert_same(restored, state)
    assert restored.params["embedding"].devices() == {jax.devices()[0]}


def test_saving_a_step_again_does_not_change_it(checkpoints):
    save(checkpoints, 3)
    checkpoints.save(3, make_state(99), {})
    assert_same(checkpoints.restore(3, abstract(make_state()))[0], make_state(3))


# Checkpoints that do not match


STATE = make_state(1)
EMBEDDING = STATE.params["embedding"]


def with_params(**params):
    """STATE with other parameters; None removes one."""
    params = {name: leaf for name, leaf in (STATE.params | params).items() if leaf is not None}
    return abstract(STATE._replace(params=params))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (with_params(embeding=EMBEDDING), "params/embeding is missing, did you mean 'params/embedding'?"),
        (with_params(embedding=None), "params/embedding is not expected"),
        (with_params(embedding=EMBEDDING[:4]), "embedding is bfloat16[8,2], expected bfloat16[4,2]"),
        (with_params(embedding=jnp.zeros((8, 2))), "embedding is bfloat16[8,2], expected float32[8,2]"),
        (
            abstract(STATE._replace(key=jax.random.key(1, impl="rbg"))),
            "key is key<fry>[], expected key<rbg>[]",
        ),
    ],
)
def test_an_array_that_does_not_match_is_named_with_both_shapes(checkpoints, target, message):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(1, target)
    assert str(caught.value).startswith(f"{checkpoints.folder}/1 does not match the model or optimizer: ")
    assert str(caught.value).endswith(message)


# A language model has a vocabulary head; a reward model initialized from it has a scalar head instead.
OPTIONAL = ("head", "scalar_head")


def trunk(**heads):
    blocks = {
        "head": {"kernel": jnp.arange(4.0)},
        "up": jnp.arange(6.0).reshape(2, 3),
    }  # a head of another path
    return {"blocks": blocks, "embed": jnp.ones((4, 2))} | heads


def read_params(checkpoints, saved, wanted, prefix="params"):
    checkpoints.save(1, {"params": saved, "step": jnp.int32(1)} if prefix else saved, {})
    checkpoints.wait()
    return read_arrays(checkpoints.folder / "1", jax.eval_shape(lambda: wanted), prefix, OPTIONAL)


@pytest.mark.parametrize("prefix", ["params", ""])
def test_optional_arrays_may_be_missing_on_either_side(checkpoints, prefix):
    language_model = trunk(head={"kernel": jnp.zeros((2, 4))})
    reward_model = trunk(scalar_head={"kernel": jnp.zeros((2, 1))})
    found = read_params(checkpoints, language_model, reward_model, prefix)
    assert found.pop("scalar_head") == {"kernel": None}
    assert_same(found, trunk())


def test_optional_arrays_on_both_sides_are_read(checkpoints):
    reward_model = trunk(scalar_head={"kernel": jnp.full((2, 1), 3.0)})
    assert_same(read_params(checkpoints, reward_model, reward_model), reward_model)


def test_optional_arrays_on_both_sides_must_match(checkpoints):
    saved, wanted = (trunk(scalar_head={"kernel": jnp.zeros((2, n))}) for n in (1, 3))
    with pytest.raises(
        CheckpointError, match=r"scalar_head/kernel is float32\[2,1\], expected float32\[2,3\]"
    ):
        read_params(checkpoints, saved, wanted)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("blocks", "params/blocks/head/kernel is missing"), ("embed", "params/embed is missing")],
)
def test_arrays_that_are_not_optional_must_be_saved(checkpoints, missing, message):
    language_model = trunk(head={"kernel": jnp.zeros((2, 4))})
    del language_model[missing]
    with pytest.raises(CheckpointError, match=message):
        read_params(checkpoints, language_model, trunk(scalar_head={"kernel": jnp.zeros((2, 1))}))


def test_an_extra_array_is_an_error_unless_it_is_optional(checkpoints):
    saved = trunk() | {"extra": jnp.zeros(2)}
    with pytest.raises(CheckpointError, match="params/extra is not expected"):
        read_params(checkpoints, saved, trunk())


def test_of_many_arrays_that_do_not_match_the_first_are_named(checkpoints):
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"query is .*; and 3 more$"):
        checkpoints.restore(1, abstract(make_state(width=5)._replace(opt_state=())))
