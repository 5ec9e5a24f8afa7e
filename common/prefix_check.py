"""Start-up check of stage 02: does this very model compute the same with shared prefixes as without?"""
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from common import dist, mllm
from common.groups import Cohort
from common.mllm import Judge
from common.replies import answer_logp, encode_images, learning_mode

# relative, of loss and gradients. Measured on small models: 1e-6 and 1e-6 in float32, 4e-5 and 0.02 in bfloat16, whose
# rounding hides small faults; replies that see each other: 0.01 and 0.25
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 0.1)}


def loss_and_gradients(judge: Judge, cohort: Cohort) -> tuple[float, list[torch.Tensor]]:
    """Mean log-probability of answers to the cohort, and its gradients."""
    replies = [[judge.encode(mllm.compose_reply(targets, method)) for method in ("", "warp")]
               for targets in cohort.targets]
    digits = judge.digit_ids.expand(len(replies) * 3, -1)
    logp, mask, digit_logp = answer_logp(judge, *encode_images(judge, [cohort], [0]), [replies], digits)
    loss = logp[mask].mean() + digit_logp.mean()
    loss.backward()
    gradients = [p.grad for p in judge.model.parameters() if p.grad is not None]
    judge.model.zero_grad()
    return float(loss.detach()), gradients


def size(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(t.float().square().sum()) for t in tensors) ** 0.5


def errors(judge: Judge, cohort: Cohort, loss: float, gradients: list[torch.Tensor]) -> tuple[float, float]:
    """How far this judge's loss and gradients are off the given ones, relative."""
    own_loss, own = loss_and_gradients(judge, cohort)
    return abs(own_loss / loss - 1), size(a - b for a, b in zip(own, gradients, strict=True)) / size(gradients)


def choose_rows(cohort: Cohort, judge: Judge, reference: Judge | None = None) -> Judge:
    """
    Set plain_rows of both, and say so, unless both ways give the same loss and gradients on two of the candidates.

    Before weights are cut into shards; all ranks come to the same choice. Returns the judge.
    """
    learning_mode(judge)
    few = Cohort(cohort.id, cohort.lr, cohort.images[:2], cohort.methods[:2], cohort.ranks[:2], cohort.targets[:2])
    plain_loss, plain = loss_and_gradients(replace(judge, plain_rows=True), few)
    found = [errors(replace(judge, long=long), few, plain_loss, plain)      # as short rows attend, and as long ones do
             for long in (sys.maxsize, 0)]
    worst = dist.gather_rows(torch.tensor(found)).amax(0).tolist()
    told = f"loss {worst[0]:.1e}, gradients {worst[1]:.1e} off plain rows"
    judge.plain_rows = not all(error <= most for error, most in zip(worst, TOLERANCE[judge.net.dtype]))
    dist.print0(f"shared prefixes differ too much on this model ({told}): one plain row per reply instead, several "
                "times slower" if judge.plain_rows else f"shared prefixes checked on this model: {told}")
    judge.model.eval()                                                      # a run that is done learning only samples
    if reference:
        reference.plain_rows = judge.plain_rows
    return judge
