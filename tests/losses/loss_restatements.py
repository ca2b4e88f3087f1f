"""Every loss implemented again in float64 numpy, one token or pair at a time: slow, plain, independent.

Each returns (sum, weight, metrics) with metrics a dict of (sum, weight). `frozen` holds the arrays that a
loss treats as constants even where they depend on what is differentiated.
"""

import numpy as np


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x)) if x > 0 else x - np.log1p(np.exp(x))


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def reduce_tokens(per_token, mask, mode, max_length=None):
    """per_token maps (b, t) to a number for every counted position."""
    rows = [[per_token[b, t] for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]
    counted = [row for row in rows if row]
    if mode == "token_mean":
        return sum(map(sum, rows)), sum(map(len, rows))
    if mode == "sequence_mean":
        return sum(np.mean(row) for row in counted), len(counted)
    if mode == "sequence_sum":
        return sum(map(sum, rows)), len(counted)
    return sum(map(sum, rows)), len(rows) * max_length


def tally(names, mask):
    """A metric per name, each a running [sum, weight] over the counted elements."""
    weight = int((mask != 0).sum())
    return {name: [0.0, weight] for name in names}


def where_counted(mask):
    return list(zip(*np.nonzero(mask), strict=True))


def cross_entropy(logits, targets, mask, label_smoothing=0.0, z_loss=0.0):
    metrics = tally(["loss", "accuracy"] + (["z_loss"] if z_loss else []), mask)
    total = 0.0
    for b, t in where_counted(mask):
        z, target = logits[b, t], targets[b, t]
        log_p = log_softmax(z)
        log_normaliser = np.log(np.exp(z - z.max()).sum()) + z.max()
        metrics["loss"][0] += -log_p[target]
        metrics["accuracy"][0] += float(z.argmax() == target)
        total += (1 - label_smoothing) * -log_p[target] + label_smoothing * -log_p.mean()
        if z_loss:
            metrics["z_loss"][0] += z_loss * log_normaliser**2
            total += z_loss * log_normaliser**2
    return total, int((mask != 0).sum()), metrics


def linear_logits(hidden, head, softcap=None, temperature=1.0):
    logits = np.einsum("btd,dv->btv", hidden, head)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    return logits / temperature


def bradley_terry(chosen, rejected, mask, margin=None, center_coefficient=0.0):
    metrics = tally(["loss", "accuracy", "margin", "chosen_reward", "rejected_reward"], mask)
    for (b,) in where_counted(mask):
        c, r = chosen[b], rejected[b]
        wanted = 0.0 if margin is None else margin[b]
        metrics["loss"][0] += -log_sigmoid(c - r - wanted) + center_coefficient * (c + r) ** 2
        metrics["accuracy"][0] += float(c > r)
        metrics["margin"][0] += c - r
        metrics["chosen_reward"][0] += c
        metrics["rejected_reward"][0] += r
    return *metrics["loss"], metrics


def dpo(chosen, rejected, ref_chosen, ref_rejected, mask, variant, beta, e=0.0, lengths=None):
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    metrics = tally(names, mask)
    for (b,) in where_counted(mask):
        c, j = chosen[b] - ref_chosen[b], rejected[b] - ref_rejected[b]
        metrics["rewards/chosen"][0] += beta * c
        metrics["rewards/rejected"][0] += beta * j
        metrics["rewards/margins"][0] += beta * c - beta * j
        metrics["rewards/accuracies"][0] += float(c > j)
        d = c - j
        if variant == "sigmoid":
            loss = -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d)
        elif variant == "robust":
            loss = (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e)
        elif variant == "hinge":
            loss = max(0.0, 1 - beta * d)
        elif variant == "ipo":
            if lengths is not None:
                d = c / lengths[0][b] - j / lengths[1][b]
            loss = (d - 1 / (2 * beta)) ** 2
        elif variant == "apo_zero":
            loss = 1 - sigmoid(beta * c) + sigmoid(beta * j)
        elif variant == "sppo":
            loss = (c - 1 / (2 * beta)) ** 2 + (j + 1 / (2 * beta)) ** 2
        metrics["loss"][0] += loss
    return *metrics["loss"], metrics


def kl(x, estimator):
    return {"k1": x, "k2": x**2 / 2, "k3": np.expm1(-x) + x}[estimator]


def policy(
    log_probs,
    old_log_probs,
    advantages,  # [B, T]
    mask,
    *,
    mode,
    clip_low,
    clip_high,
    variant="ppo",
    dual_clip=None,
    max_length=None,
    importance_weights=None,
    ref_log_probs=None,
    kl_coefficient=0.0,
    kl_estimator="k3",
    kl_importance_weighted=False,
    entropy=None,
    entropy_coefficient=0.0,
    frozen_log_probs=None,
):
    """PPO's policy loss, and GRPO's with advantages repeated along T."""
    names = ["ratio", "approx_kl", "clip_fraction_low", "clip_fraction_high", "clip_fraction"]
    names += ["kl"] * (ref_log_probs is not None) + ["entropy"] * (entropy is not None)
    metrics, per_token = tally(names, mask), {}
    for b, t in where_counted(mask):
        a = advantages[b, t]
        log_ratio = log_probs[b, t] - old_log_probs[b, t]
        if variant == "gspo":
            counted = mask[b] != 0
            ratio = np.exp((log_probs[b, counted] - old_log_probs[b, counted]).mean())
        else:
            ratio = np.exp(log_ratio)
        if variant == "cispo":
            frozen_ratio = np.exp(frozen_log_probs[b, t] - old_log_probs[b, t])
            loss = -min(frozen_ratio, clip_high) * a * log_probs[b, t]
            low, high = False, ratio > clip_high and a > 0
        else:
            loss = -min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
            if dual_clip is not None and a < 0:
                loss = min(loss, -dual_clip * a)
            low, high = ratio < 1 - clip_low and a < 0, ratio > 1 + clip_high and a > 0
        if importance_weights is not None:
            loss *= importance_weights[b, t]
        if ref_log_probs is not None:
            divergence = kl(log_probs[b, t] - ref_log_probs[b, t], kl_estimator)
            divergence *= ratio if kl_importance_weighted else 1
            metrics["kl"][0] += divergence
            loss += kl_coefficient * divergence
        if entropy is not None:
            metrics["entropy"][0] += entropy[b, t]
            loss -= entropy_coefficient * entropy[b, t]
        per_token[b, t] = loss
        metrics["ratio"][0] += ratio
        metrics["approx_kl"][0] += ratio_kl(log_ratio)
        metrics["clip_fraction_low"][0] += float(low)
        metrics["clip_fraction_high"][0] += float(high)
        metrics["clip_fraction"][0] += float(low or high)
    total, weight = reduce_tokens(per_token, mask, mode, max_length)
    return total, weight, metrics | {"loss": (total, weight)}


def ratio_kl(log_ratio):
    """k3 of old against new, from the old policy's samples: (r - 1) - log r."""
    return np.exp(log_ratio) - 1 - log_ratio


def value(values, old_values, returns, mask, clip):
    names = ["loss", "clip_fraction", "return", "return_squared", "error", "error_squared"]
    metrics = tally(names, mask)
    for b, t in where_counted(mask):
        v, old, r = values[b, t], old_values[b, t], returns[b, t]
        plain = clipped = (v - r) ** 2
        if clip is not None:
            clipped = (min(max(v, old - clip), old + clip) - r) ** 2
        metrics["loss"][0] += 0.5 * max(plain, clipped)
        metrics["clip_fraction"][0] += float(clipped > plain)
        metrics["return"][0] += r
        metrics["return_squared"][0] += r**2
        metrics["error"][0] += r - v
        metrics["error_squared"][0] += (r - v) ** 2
    return *metrics["loss"], metrics
