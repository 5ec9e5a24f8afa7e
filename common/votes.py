"""From choices between two candidates to ranks, one rule for all: imported votes and answers of a multimodal LLM."""
import numpy as np
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from common import metrics

CHOICES = ("a", "b", "tie", "cannot_tell")
PRIOR = 0.02    # virtual ties between any two candidates: strengths stay finite where one always wins


def tally(count: int, votes: list[dict]) -> np.ndarray:
    """wins [count, count] of the row over the column; a tie is half a win for both, "cannot_tell" counts nothing."""
    wins = np.zeros((count, count))
    for vote in votes:
        a, b, choice = vote["a"], vote["b"], vote["choice"]
        if choice != "cannot_tell":
            share = {"a": 1.0, "tie": 0.5, "b": 0.0}[choice]
            wins[a, b] += share
            wins[b, a] += 1 - share
    return wins


def connected(wins: np.ndarray) -> bool:
    """Whether votes lead from every candidate to every other; else their order is unknown."""
    return connected_components(wins, directed=False)[0] == 1


def win_shares(wins: np.ndarray) -> np.ndarray:
    """
    [n] in 0..1: how often a candidate beats another of the group, picked by chance.

    Bradley and Terry's model (1952): i beats j with probability 1 / (1 + exp(s_j - s_i)); the strengths s maximize the
    likelihood of wins [n, n] plus PRIOR virtual ties per pair.
    """
    wins = wins + PRIOR / 2 * (1 - np.eye(len(wins)))

    def loss(s: np.ndarray) -> tuple[float, np.ndarray]:
        lost = wins * expit(s[None] - s[:, None])                       # [i, j] wins of i that the model finds unlikely
        return -(wins * log_expit(s[:, None] - s[None])).sum(), lost.sum(0) - lost.sum(1)
    strengths = minimize(loss, np.zeros(len(wins)), jac=True, method="BFGS", options={"gtol": 1e-7}).x
    chance = expit(strengths[:, None] - strengths)
    return (chance.sum(1) - 0.5) / (len(wins) - 1)                      # the diagonal is 1/2


def label(count: int, votes: list[dict], margin: float, *, source: str) -> dict | None:
    """
    {ranks, scores, source, votes, scale} of `count` candidates from votes {a, b: indices, choice: one of CHOICES}.

    Scores: win_shares; ranks: those less than `margin` below the best of a rank share it. None if the votes do not
    connect all candidates.
    """
    wins = tally(count, votes)
    if not connected(wins):
        return None
    scores = [round(float(share), 4) for share in win_shares(wins)]
    return {"ranks": metrics.ranks(scores, max(margin, 1e-9)), "scores": scores, "source": source, "votes": votes,
            "scale": "group"}                                           # see labels.common_scores
