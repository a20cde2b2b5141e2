"""What is worth watching at a token beside its loss. docs/metrics.md has the formulas and how to read them.

C tokens of a chunk, M of them that one teacher speaks about, K top tokens of each side.
"""

import torch
from torch import Tensor

from opd.config import LossConfig
from opd.topk import overlap

POSITIONS = ("front", "middle", "tail")


def keys_of(cfg: LossConfig, support: str) -> tuple[str, ...]:
    """What teachers are asked for each token: the same for every chunk of a run."""
    keys = ("distill/k3", "distill/teacher_entropy", "distill/entropy_gap")
    if support == "sampled":
        return keys
    if cfg.overlap_k > 0:
        keys += ("distill/overlap_ratio", "distill/overlap_mass", "distill/overlap_advantage")
    if support != "teacher_topk":
        keys += ("distill/spilled",)
    return (*keys, "distill/student_mass", "distill/teacher_mass")


class Average:
    """Values of several teachers at the tokens of a chunk, averaged with the teachers' weights; NaN where nobody spoke."""

    def __init__(self, keys: tuple[str, ...], like_C: Tensor):
        zero_C = torch.zeros_like(like_C)
        self.sums, self.weights = dict.fromkeys(keys, zero_C), dict.fromkeys(keys, zero_C)

    def add(self, index_M: Tensor, weights_M: Tensor, values: dict[str, Tensor]) -> None:
        for key, value_M in values.items():
            known_M = (weights_M * ~value_M.isnan()).to(self.weights[key].dtype)
            self.sums[key] = self.sums[key].index_add(0, index_M, known_M * value_M.masked_fill(value_M.isnan(), 0))
            self.weights[key] = self.weights[key].index_add(0, index_M, known_M)

    def values(self) -> dict[str, Tensor]:
        return {key: self.sums[key] / self.weights[key] for key in self.sums}  # 0 / 0 is the NaN of no one


def overlap_of(
    student_ids_MK: Tensor, teacher_ids_MK: Tensor, student_logprobs_MK: Tensor, teacher_logprobs_MK: Tensor
) -> dict[str, Tensor]:
    """How far the top-K sets agree; the log-probabilities are those of the teacher's ids.

    The advantage is the mean over the common tokens v of p'(v) (log q'(v) - log p'(v)), p' and q' renormalised on them
    (arXiv 2604.13016): at most 0, NaN where no token is common.

    Example: student (1, 2), teacher (2, 5): ratio 1/2; one common token, so p' = q' = 1 and the advantage is 0.
    """
    common_MK = (teacher_ids_MK.unsqueeze(-1) == student_ids_MK.unsqueeze(-2)).any(dim=-1)
    p_MK = student_logprobs_MK.masked_fill(~common_MK, -torch.inf).log_softmax(-1)
    q_MK = teacher_logprobs_MK.masked_fill(~common_MK, -torch.inf).log_softmax(-1)
    terms_MK = (p_MK.exp() * (q_MK - p_MK)).masked_fill(~common_MK, 0.0)
    count_M = overlap(teacher_ids_MK, student_ids_MK)
    return {
        "distill/overlap_ratio": count_M / student_ids_MK.shape[-1],
        "distill/overlap_mass": (student_logprobs_MK.exp() * common_MK).sum(-1),
        "distill/overlap_advantage": terms_MK.sum(-1) / count_M,  # 0 / 0 where nothing is common
    }


def by_position(key: str, value_C: Tensor, third_C: Tensor) -> dict[str, Tensor]:
    """`key`_front, _middle and _tail: the value where the token stands in that third of its response, else NaN."""
    return {f"{key}_{name}": value_C.masked_fill(third_C != i, torch.nan) for i, name in enumerate(POSITIONS)}
