"""Whether the sampler is the student: judged on tokens that it has sampled, where the run can still
be stopped.

A sampler with other weights, or that computes its model in another way, writes plausible text, and
everything that is learned from it is learned about another model. The first check is before any
update, and its difference is that of two libraries' arithmetic; the next is after the first weights
were pushed. From then on every `--parity_every`-th step is checked.

N tokens of responses that the student's weights of now have sampled.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opd import distributed
from opd.config import RolloutConfig
from opd.student import Student
from opd.types import MicroBatch, Rollout, TeacherScores

Cut = Callable[[Sequence[Rollout], Sequence[tuple[TeacherScores, ...]]], list[MicroBatch]]

MOST_ROLLOUTS = 16  # of a rank and check: a forward of so many is soon done
UNSCORED = (TeacherScores(teacher="", weight=1.0),)  # what is judged needs no teacher
FIRST_CHECKS = 2  # before any update, and after the first push

# Mean difference of log-probabilities, in nats. float32 adds up in another order: 1e-6 to 1e-5
# (docs/models.md). bfloat16 depends on the model, so the first check measures its floor, and bounds
# it: about .01 for dense models, more for experts.
FLOAT32_LIMIT = 1e-4
FIRST_LIMIT = 0.1
TIMES_FLOOR, LEAST_LIMIT = 4.0, 0.03


class Parity:
    """The judge of a run.

    `cut` makes micro-batches as the loop does; `every` is `--parity_every`, and 0 judges nothing.
    """

    def __init__(self, cut: Cut, rollout: RolloutConfig, *, every: int, dtype: torch.dtype):
        self.cut, self.rollout, self.every = cut, rollout, every
        self.is_exact = dtype == torch.float32
        self.limit = FLOAT32_LIMIT if self.is_exact else FIRST_LIMIT
        self.checks = 0

    def is_due(self, step: int) -> bool:
        """Whether `step` is to be checked: the first two in which the student writes, and every so
        many.
        """
        return self.every > 0 and (self.checks < FIRST_CHECKS or step % self.every == 0)

    def check(self, student: Student, rollouts: Sequence[Rollout], step: int) -> None:
        """Stops all ranks if the sampler of these rollouts is not the student of now; without any
        nothing is decided.

        Before an update of `step`. Collective. Raises distributed.Stop.
        """
        some = list(itertools.islice(rollouts, MOST_ROLLOUTS))
        total, count, largest = 0.0, 0, 0.0
        for mb in self.cut(some, [UNSCORED] * len(some)):
            trainer_N = student.logprobs(mb, self.rollout.temperature).cpu()
            excess_N = self.excess(trainer_N, mb.at_loss_tokens(mb.rollout_logprobs_BS))
            total, count = total + float(excess_N.double().sum()), count + len(excess_N)
            largest = max(largest, float(excess_N.max())) if count else largest
        total, count = distributed.all_reduce([total, count])
        (largest,) = distributed.all_reduce([largest], "max")
        if count:
            self.decide(total / count, largest, int(count), step)

    def excess(self, trainer_N: Tensor, sampler_N: Tensor) -> Tensor:
        """How much of each difference cannot be, [N].

        What is sampled from the likeliest tokens alone is likelier by their share, which is at
        least `top_p`.
        """
        gain = math.inf if self.rollout.top_k > 0 else -math.log(self.rollout.top_p)
        gap_N = sampler_N - trainer_N
        return torch.where(
            gap_N.isfinite(), (-gap_N).clamp(min=0) + (gap_N - gain).clamp(min=0), math.inf
        )

    def decide(self, mean: float, largest: float, count: int, step: int) -> None:
        """Raises distributed.Stop if `mean` is over the limit.

        The first check of a bfloat16 run sets the limit of the others.
        """
        if not mean <= self.limit:
            when = "before any update" if self.checks == 0 else "after weights were pushed"
            nothing_trained = self.checks == 0 and step == 0
            broken = (
                ""
                if math.isfinite(mean)
                else " (one of them computes no number: look for NaN and infinity in the weights)"
            )
            raise distributed.Stop(
                f"step {step + 1}: the sampler is not the student: {when}, their log-probabilities "
                f"of the same {count} tokens differ by {mean:.2g} on average (at most "
                f"{largest:.2g}){broken}, and {self.limit:.2g} can be rounding; nothing was "
                "trained on these tokens; see docs/metrics.md (parity) and docs/models.md; "
                "--parity_every 0 goes on unjudged",
                status=2 if nothing_trained else 1,
            )
        if self.checks == 0 and not self.is_exact:
            self.limit = max(TIMES_FLOOR * mean, LEAST_LIMIT)
        self.checks += 1
