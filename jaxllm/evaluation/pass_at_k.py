"""How often one of k answers is right."""

import numpy as np


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """For every prompt the probability that at least one of k of its answers, drawn without replacement, is
    right: 1 - C(n - c, k) / C(n, k) for c right ones of n, float64 [P].

    The unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374, eq. 1). Their mean over prompts is
    the figure, and their spread gives its standard error.

    Args:
      right: bool [P, n], of n answers to each of P prompts.
      k: 1 to n.

    Raises:
      ValueError: k is not in 1 to n.

    >>> pass_at_k(np.array([[True, False, False, False], [False] * 4]), 2).tolist()
    [0.5, 0.0]
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be from 1 to the {n} answers there are")
    wrong = n - right.sum(1)
    # C(wrong, k) / C(n, k), as a product of k factors that cannot overflow; 0 once wrong < k.
    factors = (wrong[:, None] - np.arange(k)) / (n - np.arange(k))
    return 1 - np.clip(factors, 0, None).prod(1)
