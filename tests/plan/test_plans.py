"""Plans of tiny runs by the compiler at hand, and what is computed of them by hand."""

import functools
import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_runs import ROOT, parse_config

from jaxllm.config import run_script
from jaxllm.errors import ConfigError
from jaxllm.models.config import flops_per_token
from jaxllm.parallel.sharding import MeshConfig, make_mesh
from jaxllm.plan import run as runs
from jaxllm.plan.candidate import make_plan, read_plan, refusal
from jaxllm.plan.flops import traced_flops
from jaxllm.plan.hardware import CHIPS, find_hardware
from jaxllm.plan.hlo import Collective, read_program
from jaxllm.plan.programs import trace
from jaxllm.plan.roofline import roofline
from jaxllm.plan.search import choices, pareto, promising
from jaxllm.plan.show import describe, first_knob
from jaxllm.plan.targets import PLUGINS, Target, has_compiler, target_text
from jaxllm.stages import build_program

V5E = find_hardware("v5e-8")
MESH = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}


@functools.cache
def grpo():
    """A GRPO run on 8 devices."""
    fields = {"rollout.num_prompts": 8, "data.batch_size": 16, "rollout.replicate_params": True}
    return parse_config("smoke.py:grpo", MESH | fields)


# Rollouts


def test_decoding_on_a_mesh_splits_the_cache_and_sends_only_over_tensor():
    """But for the two numbers by which all devices know when to stop: rows over all, and their longest."""
    program = build_program(grpo())
    step = trace(program, "decode", memory=V5E.memory)
    lowered = step.traced.lower()
    compiled = lowered.compile()
    layouts = {leaf.sharding.spec for leaf in jax.tree.leaves(step.cache)}
    after = {leaf.spec for leaf in jax.tree.leaves(compiled.output_shardings.cache)}
    assert layouts == after == {P(("data", "fsdp"), "tensor")}  # so that the loop compiles once
    found, unknown, _ = read_program(compiled.as_text(), dict(program.mesh.shape))
    others = [each for each in found if each.axis != "tensor"]
    assert sum(each.count for each in others) == 2, others
    assert sum(each.bytes for each in others) == 8, others
    assert unknown == 1


# One program


@pytest.fixture(scope="module")
def plan():
    return make_plan(grpo(), V5E, "score", Target(jax.devices(), "cpu", "a note"))


def test_a_plan_has_memory_flops_and_a_roofline(plan):
    assert plan.fits
    assert not plan.error
    weights, batch = plan.memory["weights"], 16 * 128 * 4 // 4
    assert plan.memory["peak"] >= weights + batch
    assert plan.flops["traced"] == pytest.approx(plan.flops["by hand"], rel=0.25)  # attention masks in blocks
    assert 0 < plan.mfu < 1
    assert plan.tokens_per_second == plan.tokens / plan.roofline.bound
    assert plan.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert plan.notes == ("a note",)


def test_a_plan_survives_its_json(plan):
    assert read_plan(json.loads(json.dumps(asdict(plan)))) == plan


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_change(plan):
    memory = {"parameters": 1e9, "optimizer": 2e9, "gradients": 1e9}
    refused = replace(plan, step="train", fits=False, over=3e9, available=16e9, memory=memory)
    assert describe(refused).startswith("train: does not fit by 3 GB into 16 GB a device: parameters 1")
    assert "num_microbatches" in first_knob(refused)  # 15 GB are temporaries
    state = replace(refused, memory=memory | {"optimizer": 17e9, "temporaries": 1e9})
    assert "mesh.fsdp" in first_knob(state)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 40.50G of 15.75G hbm. Exceeded hbm capacity by 24.75G.",
            {"fits": False, "over": 24.75 * 2**30},
        ),
        (
            "RESOURCE_EXHAUSTED: HLO temporaries (40.25G) exceeds available HBM (15.75G)",
            {"fits": False, "over": 24.5 * 2**30},
        ),
        ("RESOURCE_EXHAUSTED: too much", {"fits": False}),
        ("INVALID_ARGUMENT: no such thing\nmore", {"error": "INVALID_ARGUMENT: no such thing"}),
    ],
)
def test_what_a_compiler_refuses_for_memory_is_an_answer(message, expected):
    assert refusal(message) == expected


def test_a_compiler_that_aborts_is_no_plan_with_its_reason(monkeypatch):
    monkeypatch.setattr(runs, "CANDIDATE", ["-c", "import os, sys; sys.stderr.write('why\\n'); os.abort()"])
    plan = runs.plan_step(grpo(), V5E, "train")
    assert plan.error == "the compiler was ended by SIGABRT: why"
    assert describe(plan) == f"train: no plan: {plan.error}"


def test_the_script_prints_each_plan_and_writes_it(plan, monkeypatch, tmp_path, capsys):
    from experiments import plan as script

    monkeypatch.setattr(runs, "plan_step", lambda config, hardware, step: replace(plan, step=step))
    argv = ["plan.py", f"--config={ROOT}/configs/smoke.py:grpo", f"--json={tmp_path}/plans.json"]

    def run(*flags):
        return run_script(script.main, script.config_class, script.define_flags, [*argv, *flags])

    assert run("--hardware=v5e-8,h100x8", "--steps_of=train,rollout", "--price_per_hour=2") == 0
    plans = [read_plan(each) for each in json.loads((tmp_path / "plans.json").read_text())]
    assert [each.step for each in plans] == ["train", "prefill", "decode"] * 2
    printed = capsys.readouterr().out
    assert printed.count("planned, not measured: ") == 2
    assert printed.count("at 2 a chip-hour") == 2
    assert run() == run("--hardware=v5e-8", "--steps_of=all") == 78
    errors = capsys.readouterr().err
    assert "--hardware=NAME is missing" in errors
    assert "--steps_of=all: choose of train, rollout, score" in errors
    argv[1] = f"--config={ROOT}/configs/smoke.py:sft"
    assert run("--hardware=v5e-8", "--steps_of=train,rollout") == 78
    assert "--steps_of=train,rollout: stage='sft' has no rollouts, only train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hardware=v5e-8,xyz"], "--hardware=xyz: name a chip and how many"),
        (["--hardware=v5e-8,h100"], "--hardware=h100: choose one of h100x1 to h100x8"),
        (["--json=."], "--json=. is a folder: name a file in it"),
        (["--json=/nowhere/plans.json"], "--json=/nowhere/plans.json: there is no such folder"),
        (["--tokens=0"], "--tokens=0 must be more than 0"),
        (["--price_per_hour=-1"], "--price_per_hour=-1 must not be negative"),
        (["--search", "--tokens=1e9"], "--tokens is for a plan of the train step, without --search"),
        (["--steps_of=score", "--price_per_hour=1"], "--price_per_hour is for a plan of the train step"),
        (["--compile=3"], "--compile is for --search: remove it"),
    ],
)
def test_bad_flags_are_an_error_before_the_first_plan(monkeypatch, capsys, flags, message):
    from experiments import plan as script

    monkeypatch.setattr(runs, "plan_step", lambda *_: pytest.fail("made a plan"))
    argv = ["plan.py", f"--config={ROOT}/configs/smoke.py:grpo", "--hardware=v5e-8", *flags]
    assert run_script(script.main, script.config_class, script.define_flags, argv) == 78
    assert message in capsys.readouterr().err


# By hand


def test_the_products_with_the_vocabulary_are_of_completions_and_not_of_the_critic():
    ppo = build_program(parse_config("smoke.py:ppo", {}))
    model, length = ppo.config.model, ppo.config.data.sequence_length
    headless, head = flops_per_token(model, length, unembedded=0.0), 6 * model.width * model.vocab_size
    completions = ppo.config.rollout.sampling.max_new_tokens / length
    assert completions < 1
    assert ppo.flops_per_token == 2 * headless + completions * head


def test_flops_count_loops_recomputation_and_gradients():
    w = jax.ShapeDtypeStruct((8, 8), np.float32)
    x = jax.ShapeDtypeStruct((4, 8), np.float32)
    product = 2 * 4 * 8 * 8

    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0].sum()

    def count(function):
        return traced_flops(jax.jit(function).trace(x, w).jaxpr.jaxpr)

    assert count(repeated) == 3 * product
    assert count(jax.grad(repeated, argnums=(0, 1))) == 9 * product
    assert count(jax.grad(jax.checkpoint(repeated), argnums=(0, 1))) == 12 * product
    assert count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)) == 2 * product


def test_flops_of_a_shard_map_are_those_of_all_devices():
    mesh = make_mesh(MeshConfig(data=8, fsdp=1, tensor=1))
    run = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    jaxpr = jax.jit(run).trace(jax.ShapeDtypeStruct((16, 4), np.float32)).jaxpr.jaxpr
    assert traced_flops(jaxpr, devices=8) == 8 * 2 * 2 * 2 * 4


def test_a_roofline_by_hand():
    chip = CHIPS["v5e"]
    sent = [
        Collective("all-reduce", "data", 8, 3, 8 * chip.network),  # goes round twice
        Collective("all-gather", "fsdp", 4, 3, 4 * chip.network),
        Collective("collective-permute", "data", 8, 1, chip.network),
    ]
    time = roofline(chip, 5 * chip.flops, 2 * chip.memory_bandwidth, sent)
    assert (time.compute, time.memory, time.network) == pytest.approx((5, 2, 14 + 3 + 1))
    assert (time.bound, time.sum, time.limit) == (time.network, pytest.approx(25), "network")


# Hardware


@pytest.mark.parametrize(
    ("name", "kind", "count", "topology"),
    [
        ("v5e-64", "TPU v5 lite", 64, "v5e:8x8"),
        ("v5p-128", "TPU v5", 64, "v5p:4x4x4"),  # named by cores, of which a chip has two
        ("v6e-256", "TPU v6 lite", 256, "v6e:16x16"),
        ("h100x8", "NVIDIA H100 80GB HBM3", 8, "1x1x8"),
        ("b200x1", "NVIDIA B200", 1, "1x1x1"),
    ],
)
def test_hardware_has_the_chips_that_its_name_rents(name, kind, count, topology):
    hardware = find_hardware(name)
    assert (hardware.chip.kind, hardware.count, hardware.topology) == (kind, count, topology)
    assert hardware.chip.flops > 1e14


@pytest.mark.parametrize("name", ["v7-8", "v5e-7", "v5p-3", "h100x16", "h100", "v5e-"])
def test_other_hardware_is_an_error_that_names_what_there_is(name):
    with pytest.raises(ConfigError, match=f"--hardware={name}"):
        find_hardware(name)


def test_a_gpu_target_has_the_memory_and_the_kind_of_its_chip():
    text = target_text(CHIPS["h200"])
    assert "device_memory_size: 141000000000" in text
    assert 'device_description_str: "NVIDIA H200"' in text


# Search


def test_a_search_tries_only_what_divides_and_prefers_the_batch_size_of_the_config():
    found = choices(grpo(), V5E)
    assert found
    for each in found:
        mesh = [each.fields[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")]
        rows = mesh[0] * mesh[1] * each.fields["training.num_microbatches"]
        assert np.prod(mesh) == 8
        assert each.fields["data.batch_size"] == 16  # follows from the rollout
        assert 16 % rows == 0
        assert mesh[2] <= 2  # key-value heads
    chosen = promising(found, V5E.memory, 4)
    assert len(chosen) == 4
    assert min(each.seconds_per_token for each in found) == chosen[0].seconds_per_token
    assert promising(found, memory=1.0, number=4) == []


def test_the_front_is_what_no_other_beats():
    assert pareto([(3, 1), (1, 3), (2, 2), (2, 3), (3, 3)], lambda each: each) == [(1, 3), (2, 2), (3, 1)]


# The compilers themselves


@pytest.mark.skipif(not has_compiler(V5E), reason="needs libtpu: pip install 'jaxllm[plan]'")
def test_a_tpu_plan_is_made_by_its_own_compiler():
    plan = runs.plan_step(grpo(), V5E, "train")
    assert plan.compiler.startswith(PLUGINS["tpu"])
    assert plan.fits
    assert {each.axis for each in plan.collectives} >= {"tensor", "fsdp"}


def test_without_the_compiler_the_fake_devices_of_a_cpu_do_and_the_note_has_the_command(monkeypatch):
    from jaxllm.plan import targets

    monkeypatch.setattr(targets, "has_compiler", lambda hardware: False)
    target = targets.find_target(V5E)
    assert (len(target.devices), target.compiler) == (8, "cpu")
    assert f"pip install 'jax[tpu]=={jax.__version__}'" in target.note
