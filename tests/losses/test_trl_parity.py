"""Values and gradients against TRL's own loss code on random tensors.

TRL's trainers hold their losses in methods, which are called here on a stand-in for the trainer: whatever
the method reads is stated, so that no default of TRL's takes part. Where TRL has no such code to call (the
advantages sit inside its rollout method, it has no PPO any more), the restatements in float64 stand alone.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses

REASON = "compares with TRL 1.16; pip install 'jaxllm[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("trl", reason=REASON)

with warnings.catch_warnings():  # not ours to fix
    warnings.simplefilter("ignore")
    from transformers.trainer_pt_utils import LabelSmoother
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import (
        _ChunkedLogProbFunction,
        entropy_from_logits,
        nanstd,
        selective_log_softmax,
    )

torch.set_num_threads(1)  # tiny tensors; more threads only fight with XLA's

B, T, V = 6, 5, 11
MASK = np.arange(T) < np.array([[5], [3], [1], [4], [5], [2]])  # no empty row, which TRL would count


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before():
    global RNG
    RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def stand_in(**attributes):
    """What every trainer's loss method touches, in evaluation mode: one process, no accumulation."""
    same = lambda x, **_: x  # noqa: E731
    accelerator = SimpleNamespace(
        gather=same, gather_for_metrics=same, reduce=same, num_processes=1, device="cpu"
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **attributes,
    )


def compare(torch_loss, jax_loss, *arrays, rtol=2e-5, atol=1e-6):
    """The value and the gradient by every array."""
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = torch_loss(*tensors)
    expected.backward()
    value, gradients = jax.value_and_grad(jax_loss, tuple(range(len(arrays))))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(value, expected.item(), rtol=rtol)
    for ours, theirs in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_and_entropy(temperature):
    logits, targets, weights = 3 * normal(B, T, V), RNG.integers(0, V, (B, T)), normal(2, B, T)

    def theirs(logits):
        log_probs = selective_log_softmax(logits, torch.tensor(targets), temperature=temperature)
        entropy = entropy_from_logits(logits / temperature)
        return (torch.tensor(weights[0]) * log_probs + torch.tensor(weights[1]) * entropy).sum()

    def ours(logits):
        log_probs = losses.token_log_probs(logits, targets, temperature=temperature)
        entropy = losses.token_entropy(logits, temperature=temperature)
        return (weights[0] * log_probs + weights[1] * entropy).sum()

    compare(theirs, ours, logits)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_head_applied_in_slices(softcap):
    """TRL's chunked head, which also returns log-probs and entropy; its head is ours transposed."""
    hidden, head, targets, weights = (
        normal(B, T, 4),
        normal(4, 40),
        RNG.integers(0, 40, (B, T)),
        normal(2, B, T),
    )

    def theirs(hidden, head):
        knobs = 0.7, 32, softcap, 1.0, ("log_probs", "entropy")  # temperature, chunk, cap, scale
        rows, labels = hidden.reshape(-1, 4), torch.tensor(targets).reshape(-1)
        log_probs, entropy, *_ = _ChunkedLogProbFunction.apply(
            rows, head.T.contiguous(), None, labels, *knobs
        )
        flat = torch.tensor(weights).reshape(2, -1)
        return (flat[0] * log_probs + flat[1] * entropy).sum()

    def ours(hidden, head):
        knobs = {"temperature": 0.7, "softcap": softcap, "block_size": 2}
        log_probs, entropy = losses.linear_token_log_probs(hidden, head, targets, **knobs)
        return (weights[0] * log_probs + weights[1] * entropy).sum()

    compare(theirs, ours, hidden, head, atol=1e-4)


def test_supervised_fine_tuning():
    logits, targets = normal(B, T, V), RNG.integers(0, V, (B, T))

    def theirs(logits):
        mask = torch.tensor(MASK)
        outputs = SimpleNamespace(
            log_probs=selective_log_softmax(logits, torch.tensor(targets)) * mask,
            label_mask=mask,
            entropy=entropy_from_logits(logits) * mask,
            is_top1=(logits.argmax(-1) == torch.tensor(targets)) & mask,
        )
        args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
        trainer = stand_in(args=args, compute_loss_func=None, label_smoother=None)
        trainer.accelerator.parallelism_config = None
        inputs = {"labels": targets, "attention_mask": mask}
        loss = SFTTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
        theirs.accuracy = trainer._metrics["eval"]["mean_token_accuracy"][0]
        return loss

    compare(theirs, lambda logits: losses.cross_entropy(logits, targets, MASK)[0].mean, logits)
    metrics = losses.cross_entropy(jnp.asarray(logits), targets, MASK)[1]
    np.testing.assert_allclose(metrics["accuracy"].mean, theirs.accuracy, rtol=1e-6)


def test_label_smoothing():
    logits, targets = normal(B, T, V), RNG.integers(0, V, (B, T))
    labels = torch.tensor(np.where(MASK, targets, -100))
    compare(
        lambda logits: LabelSmoother(epsilon=0.2)({"logits": logits}, labels),
        lambda logits: losses.cross_entropy(logits, targets, MASK, label_smoothing=0.2)[0].mean,
        logits,
    )


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center_coefficient", [None, 0.3])
def test_reward_model(with_margin, center_coefficient):
    chosen, rejected, margin = normal(B), normal(B), normal(B)
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=center_coefficient))

    def theirs(chosen, rejected):
        outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        inputs = {"margin": torch.tensor(margin)} if with_margin else {}
        return RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)

    knobs = {"center_coefficient": center_coefficient or 0.0, "margin": margin if with_margin else None}
    compare(theirs, lambda c, r: losses.bradley_terry_loss(c, r, **knobs)[0].mean, chosen, rejected)
    metrics = losses.bradley_terry_loss(jnp.asarray(chosen), jnp.asarray(rejected), **knobs)[1]
    for name in ("accuracy", "margin"):
        np.testing.assert_allclose(metrics[name].mean, trainer._metrics["eval"][name][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "their_name", "label_smoothing"),
    [
        ("sigmoid", "sigmoid", 0.0),
        ("robust", "robust", 0.2),
        ("hinge", "hinge", 0.0),
        ("ipo", "ipo", 0.0),
        ("apo_zero", "apo_zero", 0.0),
        ("sppo", "sppo_hard", 0.0),
    ],
)
def test_preferences(variant, their_name, label_smoothing):
    """Per-token log-probs in, so that IPO's lengths take part: TRL always divides by them."""
    per_token, reference = (normal(2 * B, T) * np.tile(MASK, (2, 1)) for _ in range(2))
    mask, beta = np.tile(MASK, (2, 1)), 0.3
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[their_name],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        beta=beta,
        use_weighting=False,
    )

    def theirs(log_probs):
        zeros = torch.zeros(2 * B, T)
        outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        completion_mask = torch.tensor(np.pad(mask, [(0, 0), (1, 0)])).long()
        inputs = {
            "input_ids": completion_mask,
            "completion_mask": completion_mask,
            "ref_chosen_logps": torch.tensor(reference[:B].sum(1)),
            "ref_rejected_logps": torch.tensor(reference[B:].sum(1)),
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)

    def ours(log_probs):
        sums, lengths = log_probs.sum(1), mask.sum(1)
        knobs = {"variant": variant, "beta": beta, "label_smoothing": label_smoothing}
        knobs |= {"chosen_length": lengths[:B], "rejected_length": lengths[B:]} if variant == "ipo" else {}
        return losses.dpo_loss(sums[:B], sums[B:], reference[:B].sum(1), reference[B:].sum(1), **knobs)

    compare(theirs, lambda x: ours(x)[0].mean, per_token)
    for name, metric in ours(jnp.asarray(per_token))[1].items():
        if name != "loss":
            their_metric = trainer._metrics["eval"][name][0]
            np.testing.assert_allclose(metric.mean, their_metric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("knobs", [{}, {"kl": True}, {"kl": True, "weighted": True}, {"dual_clip": 1.5}])
@pytest.mark.parametrize("importance_weighted", [False, True])
@pytest.mark.parametrize(
    ("variant", "loss_type", "level"),
    [
        ("grpo", "grpo", "token"),
        ("dr_grpo", "dr_grpo", "token"),
        ("dapo", "dapo", "token"),
        ("gspo", "grpo", "sequence"),
        ("cispo", "cispo", "token"),
    ],
)
def test_group_relative_policy_optimization(variant, loss_type, level, importance_weighted, knobs):
    dual_clip = None if variant == "cispo" else knobs.get("dual_clip")
    old, reference, weights, advantages = normal(B, T), normal(B, T), RNG.random((B, T)), normal(B)
    log_probs, entropy = old + 0.5 * normal(B, T), np.abs(normal(B, T))
    high, kl_coefficient = 1.1 if variant == "cispo" else 0.3, 0.4 if knobs.get("kl") else 0.0
    entropy_coefficient = 0.2 if variant in ("dapo", "cispo") else 0.0  # a token mean, always, in TRL
    weights = weights.astype(np.float32)

    def theirs(log_probs, entropy):
        trainer = stand_in(
            _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropy, None),
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            loss_type=loss_type,
            epsilon_low=0.2,
            epsilon_high=high,
            beta=kl_coefficient,
            args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=bool(knobs.get("weighted"))),
            use_vllm=importance_weighted,
            vllm_importance_sampling_correction=importance_weighted,
            max_completion_length=7,
            _entropy_bonus_enabled=entropy_coefficient != 0,
            use_adaptive_entropy=False,
            entropy_coef=entropy_coefficient,
        )
        inputs = {
            **dict.fromkeys(("prompt_ids", "prompt_mask"), torch.zeros(B, 1, dtype=torch.long)),
            "completion_ids": torch.zeros(B, T, dtype=torch.long),
            "completion_mask": torch.tensor(MASK).long(),
            "advantages": torch.tensor(advantages),
            "old_per_token_logps": torch.tensor(old),
            "ref_per_token_logps": torch.tensor(reference),
            "importance_sampling_ratio": torch.tensor(weights),
            "num_items_in_batch": torch.tensor(MASK.sum()),
        }
        theirs.metrics = trainer._metrics["eval"]
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs) + 0 * entropy.sum()

    def ours(log_probs, entropy):
        return losses.grpo_loss(
            log_probs,
            old,
            advantages,
            MASK,
            variant=variant,
            clip_low=0.2,
            clip_high=high,
            ref_log_probs=reference if knobs.get("kl") else None,
            kl_coefficient=kl_coefficient,
            kl_estimator="k3",
            kl_importance_weighted=bool(knobs.get("weighted")),
            dual_clip=dual_clip,
            max_length=7,
            importance_weights=weights if importance_weighted else None,
            entropy=entropy,
            entropy_coefficient=entropy_coefficient,
        )

    compare(theirs, lambda *a: ours(*a)[0].mean, log_probs, entropy)
    metrics = {
        name: float(metric.mean)
        for name, metric in ours(jnp.asarray(log_probs), jnp.asarray(entropy))[1].items()
    }
    named = {"entropy": "entropy", "kl": "kl"}
    if variant == "cispo":
        named["clip_fraction_high"] = "cispo_clip_ratio"
    elif variant != "gspo":  # there TRL counts sequences, not tokens
        named |= {"clip_fraction_low": "clip_ratio/low_mean", "clip_fraction": "clip_ratio/region_mean"}
    for name, their_name in named.items():
        if name in metrics:
            assert metrics[name] == pytest.approx(theirs.metrics[their_name][0], rel=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_advantages_with_trl_s_standard_deviation(scale):
    """The lines around it are inside TRL's rollout; NaN is its invalid row."""
    rewards = RNG.integers(0, 3, 12).astype(np.float32)
    valid = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1], bool)
    tensor = torch.tensor(np.where(valid, rewards, np.nan)).view(-1, 4)
    std = nanstd(tensor, dim=1, keepdim=True) if scale == "group" else nanstd(tensor)
    expected = tensor - torch.nanmean(tensor, dim=1, keepdim=True)
    expected = expected if scale == "none" else expected / (std + 1e-4)
    actual = losses.group_relative_advantages(jnp.asarray(rewards), 4, scale=scale, epsilon=1e-4, valid=valid)
    np.testing.assert_allclose(actual, torch.nan_to_num(expected).ravel(), rtol=1e-5, atol=1e-6)
