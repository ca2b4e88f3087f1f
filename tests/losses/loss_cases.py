"""The losses as a table, so that what holds for every loss is tested for every loss.

A case makes arrays for B = 8 rows, computes its loss from them, and computes it again by its restatement.
Masks have holes, a full row, a row of one token and an empty row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import loss_restatements as restated
import numpy as np

from jaxllm import losses

B, T, D, V = 8, 5, 3, 19
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    name: str
    arrays: Callable[[np.random.Generator], Arrays]
    loss: Callable[[Arrays], tuple[losses.Weighted, dict[str, losses.Weighted]]]
    restated: Callable[[Arrays, Arrays], tuple[float, float, dict[str, Any]]]
    differentiated: tuple[str, ...]
    shared: tuple[str, ...] = ()  # arrays without a batch axis

    def make(self) -> Arrays:
        arrays = self.arrays(np.random.default_rng(7))
        return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}


def token_mask() -> np.ndarray:
    mask = np.random.default_rng(3).integers(0, 2, (B, T))
    mask[0], mask[1], mask[2] = 1, 0, [0, 0, 1, 0, 0]
    return mask


def pair_mask() -> np.ndarray:
    return np.array([1, 0, 1, 1, 0, 1, 1, 1])


def language_arrays(rng: np.random.Generator) -> Arrays:
    logits = 2 * rng.normal(size=(B, T, V))
    targets = np.where(rng.random((B, T)) < 0.5, logits.argmax(-1), rng.integers(0, V, (B, T)))
    return {"logits": logits, "targets": targets, "mask": token_mask()}


def linear_arrays(rng: np.random.Generator) -> Arrays:
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    guesses = (hidden @ head).argmax(-1)
    targets = np.where(rng.random((B, T)) < 0.5, guesses, rng.integers(0, V, (B, T)))
    return {"hidden": hidden, "head": head, "targets": targets, "mask": token_mask()}


def pair_arrays(rng: np.random.Generator) -> Arrays:
    names = ["chosen", "rejected", "ref_chosen", "ref_rejected", "margin"]
    lengths = {k: rng.integers(1, 9, B) for k in ("chosen_length", "rejected_length")}
    return {k: 3 * rng.normal(size=B) for k in names} | lengths | {"mask": pair_mask()}


def policy_arrays(rng: np.random.Generator) -> Arrays:
    old = -rng.exponential(size=(B, T))
    return {
        "log_probs": old + 0.5 * rng.normal(size=(B, T)),
        "old_log_probs": old,
        "ref_log_probs": old + 0.5 * rng.normal(size=(B, T)),
        "advantages": rng.normal(size=(B, T)),
        "importance_weights": rng.random((B, T)),
        "entropy": rng.exponential(size=(B, T)),
        "mask": token_mask(),
    }


def group_arrays(rng: np.random.Generator) -> Arrays:
    return policy_arrays(rng) | {"advantages": rng.normal(size=B)}


def value_arrays(rng: np.random.Generator) -> Arrays:
    names = ["values", "old_values", "returns"]
    return {k: rng.normal(size=(B, T)) for k in names} | {"mask": token_mask()}


def cross_entropy_case(name: str, **knobs: float) -> Case:
    return Case(
        name,
        language_arrays,
        lambda a: losses.cross_entropy(a["logits"], a["targets"], a["mask"], **knobs),
        lambda a, frozen: restated.cross_entropy(a["logits"], a["targets"], a["mask"], **knobs),
        ("logits",),
    )


def linear_case(name: str, block_size: int | None, softcap: float | None, **knobs: float) -> Case:
    def restate(a: Arrays, frozen: Arrays) -> tuple[float, float, dict[str, Any]]:
        logits = restated.linear_logits(a["hidden"], a["head"], softcap)
        return restated.cross_entropy(logits, a["targets"], a["mask"], **knobs)

    return Case(
        name,
        linear_arrays,
        lambda a: losses.linear_cross_entropy(
            a["hidden"], a["head"], a["targets"], a["mask"], softcap=softcap, block_size=block_size, **knobs
        ),
        restate,
        ("hidden", "head"),
        ("head",),
    )


def dpo_case(variant: str, e: float = 0.0, use_lengths: bool = False) -> Case:
    pairs = ["chosen", "rejected", "ref_chosen", "ref_rejected"]

    def loss(a: Arrays) -> tuple[losses.Weighted, dict[str, losses.Weighted]]:
        lengths = {k: a[k] for k in ("chosen_length", "rejected_length")} if use_lengths else {}
        knobs = {"beta": 0.3, "variant": variant, "label_smoothing": e, "mask": a["mask"]}
        return losses.dpo_loss(*(a[k] for k in pairs), **knobs, **lengths)

    def restate(a: Arrays, frozen: Arrays) -> tuple[float, float, dict[str, Any]]:
        lengths = (a["chosen_length"], a["rejected_length"]) if use_lengths else None
        return restated.dpo(*(a[k] for k in pairs), a["mask"], variant, 0.3, e, lengths)

    name = f"dpo-{variant}" + "-smoothed" * bool(e) + "-lengths" * use_lengths
    return Case(name, pair_arrays, loss, restate, ("chosen", "rejected"))


def ppo_case(mode: str, *used: str, **knobs: Any) -> Case:
    knobs = dict(mode=mode, clip_low=0.2, clip_high=0.3, **knobs)

    def run(function: Callable[..., Any], a: Arrays) -> Any:
        positional = (a[k] for k in ("log_probs", "old_log_probs", "advantages", "mask"))
        return function(*positional, **{k: a[k] for k in used}, **knobs)

    return Case(
        f"ppo-{mode}" + "-dual" * ("dual_clip" in knobs),
        policy_arrays,
        partial(run, losses.ppo_policy_loss),
        lambda a, frozen: run(restated.policy, a),
        ("log_probs",),
    )


def grpo_case(variant: str, mode: str, *used: str, **knobs: Any) -> Case:
    knobs = {"clip_low": 0.2, "clip_high": 0.3, "variant": variant} | knobs

    def loss(a: Arrays) -> tuple[losses.Weighted, dict[str, losses.Weighted]]:
        positional = (a[k] for k in ("log_probs", "old_log_probs", "advantages", "mask"))
        return losses.grpo_loss(*positional, **{k: a[k] for k in used}, **knobs)

    def restate(a: Arrays, frozen: Arrays) -> tuple[float, float, dict[str, Any]]:
        advantages = np.repeat(a["advantages"][:, None], T, axis=1)
        return restated.policy(
            a["log_probs"],
            a["old_log_probs"],
            advantages,
            a["mask"],
            mode=mode,
            frozen_log_probs=frozen["log_probs"],
            **{k: a[k] for k in used},
            **knobs,
        )

    differentiated = ("log_probs", "entropy") if "entropy" in used else ("log_probs",)
    return Case(f"grpo-{variant}" + "-all" * bool(used), group_arrays, loss, restate, differentiated)


EVERYTHING = ("ref_log_probs", "importance_weights", "entropy")
EXTRAS = {"kl_coefficient": 0.4, "entropy_coefficient": 0.1}

CASES = [
    cross_entropy_case("cross_entropy"),
    cross_entropy_case("cross_entropy-smoothed-z", label_smoothing=0.2, z_loss=0.1),
    linear_case("linear_cross_entropy", None, None),
    linear_case("linear_cross_entropy-cut", 2, None, label_smoothing=0.2, z_loss=0.1),
    linear_case("linear_cross_entropy-cut-capped", 1, 2.0),
    Case(
        "bradley_terry",
        pair_arrays,
        lambda a: losses.bradley_terry_loss(a["chosen"], a["rejected"], mask=a["mask"]),
        lambda a, frozen: restated.bradley_terry(a["chosen"], a["rejected"], a["mask"]),
        ("chosen", "rejected"),
    ),
    Case(
        "bradley_terry-margin-centered",
        pair_arrays,
        lambda a: losses.bradley_terry_loss(
            a["chosen"], a["rejected"], margin=a["margin"], center_coefficient=0.1, mask=a["mask"]
        ),
        lambda a, frozen: restated.bradley_terry(a["chosen"], a["rejected"], a["mask"], a["margin"], 0.1),
        ("chosen", "rejected"),
    ),
    dpo_case("sigmoid"),
    dpo_case("sigmoid", e=0.1),
    dpo_case("robust", e=0.1),
    dpo_case("hinge"),
    dpo_case("ipo"),
    dpo_case("ipo", use_lengths=True),
    dpo_case("apo_zero"),
    dpo_case("sppo"),
    ppo_case("token_mean"),
    ppo_case("sequence_mean", "importance_weights", dual_clip=1.4),
    ppo_case("sequence_sum"),
    ppo_case("constant", max_length=9),
    *(
        Case(
            f"ppo_value-{clip}",
            value_arrays,
            lambda a, clip=clip: losses.ppo_value_loss(
                a["values"], a["old_values"], a["returns"], a["mask"], clip=clip
            ),
            lambda a, frozen, clip=clip: restated.value(
                a["values"], a["old_values"], a["returns"], a["mask"], clip
            ),
            ("values",),
        )
        for clip in (None, 0.5)
    ),
    grpo_case("grpo", "sequence_mean"),
    grpo_case("grpo", "sequence_mean", *EVERYTHING, **EXTRAS, kl_importance_weighted=True, dual_clip=1.4),
    grpo_case("dr_grpo", "constant", *EVERYTHING, **EXTRAS, kl_estimator="k1", max_length=9),
    grpo_case("dapo", "token_mean", *EVERYTHING, **EXTRAS, kl_estimator="k2"),
    grpo_case("gspo", "sequence_mean", *EVERYTHING, **EXTRAS, kl_importance_weighted=True),
    grpo_case("cispo", "token_mean", *EVERYTHING, **EXTRAS, clip_high=1.2),
]


def row_arrays() -> dict[str, Any]:
    """The arguments of ROW_FUNCTIONS, for B rows of T positions."""
    rng = np.random.default_rng(5)
    names = ["log_probs", "other_log_probs", "rewards", "values"]
    arrays = {k: rng.normal(size=(B, T)) for k in names} | {"scores": rng.normal(size=B)}
    arrays |= {"logits": rng.normal(size=(B, T, V)), "hidden": rng.normal(size=(B, T, D))}
    integers = {
        "targets": rng.integers(0, V, (B, T)),
        "group": rng.integers(0, 3, (B, 4)),
        "mask": token_mask(),
    }
    return {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()} | {
        k: jnp.asarray(v) for k, v in integers.items()
    }


HEAD = jnp.asarray(np.random.default_rng(6).normal(size=(D, V)), jnp.float32)

# Each computes a row from that row alone, so that rows can be split over devices and by vmap.
ROW_FUNCTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "token_log_probs": lambda a: losses.token_log_probs(a["logits"], a["targets"], temperature=0.7),
    "token_entropy": lambda a: losses.token_entropy(a["logits"], temperature=0.7),
    "linear_token_log_probs": lambda a: losses.linear_token_log_probs(
        a["hidden"], HEAD, a["targets"], block_size=2
    ),
    "kl_penalty": lambda a: losses.kl_penalty(a["log_probs"], a["other_log_probs"], estimator="k3"),
    "generalized_advantage_estimation": lambda a: losses.generalized_advantage_estimation(
        a["rewards"], a["values"], a["mask"], discount=0.9, lambda_=0.8
    ),
    "discounted_returns": lambda a: losses.discounted_returns(a["rewards"], a["mask"], discount=0.9),
    "token_rewards": lambda a: losses.token_rewards(
        a["scores"], a["log_probs"], a["mask"], kl_coefficient=0.1
    ),
    "truncated_importance_weights": lambda a: losses.truncated_importance_weights(
        a["log_probs"], a["other_log_probs"], a["mask"], level="sequence", maximum=2.0
    ),
    "group_relative_advantages": lambda a: losses.group_relative_advantages(
        a["group"].ravel(), 4, scale="group", epsilon=1e-4
    ),
    "leave_one_out_advantages": lambda a: losses.leave_one_out_advantages(a["group"].ravel(), 4),
    "overlong_penalty": lambda a: losses.overlong_penalty(a["targets"], limit=12, buffer=5),
}
