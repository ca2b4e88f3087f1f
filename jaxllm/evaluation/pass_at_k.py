"""How often one of k answers is right."""

import numpy as np


def pass_at_k(right: np.ndarray, k: int, *, known: np.ndarray | None = None) -> np.ndarray:
    """For every prompt the probability that at least one of k of its answers, drawn without replacement, is
    right: 1 - C(n - c, k) / C(n, k) for c right ones of n, float64 [P].

    The unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374, eq. 1). Their mean over prompts is
    the figure, and their spread gives its standard error.

    Args:
      right: bool [P, n], of n answers to each of P prompts.
      k: 1 to n.
      known: bool [P, n]; answers of which it is not known whether they are right count neither as right nor
        as wrong: each prompt has the n of its known ones. NaN where these are fewer than k. None: all known.

    Raises:
      ValueError: k is not in 1 to n.

    >>> pass_at_k(np.array([[True, False, False, False], [False] * 4]), 2).tolist()
    [0.5, 0.0]
    >>> answers = np.array([[True, False, False, False]])
    >>> pass_at_k(answers, 1, known=np.array([[True, True, False, False]])).tolist()
    [0.5]
    """
    if not 1 <= k <= right.shape[1]:
        raise ValueError(f"k={k} must be from 1 to the {right.shape[1]} answers there are")
    known = np.ones(right.shape, bool) if known is None else known
    n = known.sum(1)
    wrong = n - (right & known).sum(1)
    enough = n >= k
    # C(wrong, k) / C(n, k), as a product of k factors that cannot overflow; 0 once wrong < k.
    factors = (wrong[enough, None] - np.arange(k)) / (n[enough, None] - np.arange(k))
    estimates = np.full(len(right), np.nan)
    estimates[enough] = 1 - np.clip(factors, 0, None).prod(1)
    return estimates
