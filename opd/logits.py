"""A chunk of student logits: what a loss may read from it, and the one gradient that all readings send back.

A loss never differentiates through a tensor of the vocabulary's size. It reads a few numbers per token (log-probabilities,
a divergence from a teacher), computes with them under autograd, and from the gradient of each number the gradient of the
logits is put together in closed form. So a loss stays a few lines of torch on tensors of C numbers, and two tensors of
C x V are all that exists: the student's logits and the teacher's, whose room the divergence's gradient takes over.

Shape legend: C tokens of a chunk, M of them that one teacher speaks about, K ids per token, V vocabulary, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd import kernels
from opd.heads import LogitForm, OutputHead

WIDENED_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class TeacherReading:
    """What one teacher says about M tokens, at the chunk's temperature; log-probabilities and entropy in nats."""

    divergence_M: Tensor  # differentiable
    sampled_logprobs_M: Tensor
    entropy_M: Tensor
    topk_ids_MK: Tensor
    topk_logprobs_MK: Tensor


class LogitsChunk:
    """`logits_CV` are finished student logits, the head's form and the temperature included; the chunk owns their memory.

    A reading with `index_M` (int64, ascending) is about those rows only. `gradient` ends the chunk's life.
    """

    def __init__(
        self,
        logits_CV: Tensor,
        *,
        form: LogitForm,
        temperature: float,
        want_gradient: bool,
        room_CV: Tensor | None = None,
    ):
        self.logits_CV, self.form, self.temperature = logits_CV, form, temperature
        self.want_gradient = want_gradient
        self._room_CV = room_CV  # for a teacher's logits, so that not every chunk asks the system for memory
        parts = [kernels.statistics(logits_CV[rows]) for rows in kernels.tiles(logits_CV)]
        self.logsumexp_C, self.entropy_C = (torch.cat(column) for column in zip(*parts, strict=True))
        self._readings: list[_Reading] = []

    def __len__(self) -> int:
        return len(self.logits_CV)

    def logprobs(self, ids: Tensor, index_M: Tensor | None = None) -> Tensor:
        """Log-probabilities at `ids`, int64 [M] or [M, K], in the shape of `ids`; differentiable."""
        leaf = self._leaf(self.gather(ids, index_M))
        self._readings.append(_Reading(leaf, index_M, ids_MK=_columns(ids)))
        return leaf

    def gather(self, ids: Tensor, index_M: Tensor | None = None) -> Tensor:
        """The same values as `logprobs`, for looking only."""
        ids_MK = _columns(ids)
        if index_M is None:
            values_MK, logsumexp_M = self.logits_CV.gather(-1, ids_MK), self.logsumexp_C
        else:  # by two indices: rows of a vocabulary are not copied to pick K of them
            values_MK, logsumexp_M = self.logits_CV[index_M.unsqueeze(-1), ids_MK], self.logsumexp_C[index_M]
        return (values_MK - logsumexp_M.unsqueeze(-1)).view_as(ids)

    @property
    def vocab(self) -> int:
        return self.logits_CV.shape[1]

    def top_k(self, k: int, index_M: Tensor | None = None) -> Tensor:
        """Ids of the k likeliest tokens, [M, k] int64, descending."""
        parts = [kernels.top_k(self.logits_CV[rows], k)[1] for rows in kernels.tiles(self.logits_CV)]
        return torch.cat(parts) if index_M is None else torch.cat(parts)[index_M]

    def divergence(
        self, teacher_hidden_MH: Tensor, head: OutputHead, labels_M: Tensor, index_M: Tensor | None = None, *,
        kind: str, jsd_beta: float, skew_alpha: float, topk: int = 0,
    ) -> TeacherReading:  # fmt: skip
        """Full-vocabulary divergence from the teacher with these hidden states, and its `topk` likeliest tokens."""
        assert len(teacher_hidden_MH) == (len(self) if index_M is None else len(index_M))
        room_MV = self._room(len(teacher_hidden_MH), torch.promote_types(head.weight_VH.dtype, torch.float32))
        teacher_MV = project(teacher_hidden_MH, head, self.temperature, out=room_MV).to(self.logits_CV.dtype)
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for rows in kernels.tiles(teacher_MV):
            tile = self._compare(rows, teacher_MV, labels_M[rows], index_M, kind, jsd_beta, skew_alpha, topk)
            for column, value in zip(columns, tile, strict=True):
                column.append(value)
        divergence_M, *theirs = (torch.cat(column) for column in columns)
        leaf = self._leaf(divergence_M)
        self._readings.append(_Reading(leaf, index_M, gradient_MV=teacher_MV))
        return TeacherReading(leaf, *theirs)

    @torch.no_grad()
    def _compare(self, rows, teacher_MV, labels_T, index_M, kind, jsd_beta, skew_alpha, topk) -> tuple[Tensor, ...]:
        """One tile of `divergence`; the gradient takes the place of the tile's teacher logits."""
        mine = rows if index_M is None else index_M[rows]
        logits_TV, theirs_TV = self.logits_CV[mine], teacher_MV[rows]
        logsumexp_T, entropy_T = kernels.statistics(theirs_TV)
        sampled_T = theirs_TV.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1) - logsumexp_T
        top_TK, topk_ids_TK = kernels.top_k(theirs_TV, topk)
        divergence_T, gradient_TV = kernels.divergence_and_gradient(
            logits_TV, self.logsumexp_C[mine], theirs_TV, logsumexp_T,
            kind=kind, jsd_beta=jsd_beta, skew_alpha=skew_alpha,
        )  # fmt: skip
        if self.want_gradient:
            theirs_TV.copy_(self._through_form(gradient_TV, logits_TV))
        return divergence_T, sampled_T, entropy_T, topk_ids_TK, top_TK - logsumexp_T.unsqueeze(-1)

    def _room(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """The next `rows` of the memory that was set aside, if they are left and fit."""
        if self._room_CV is None or rows > len(self._room_CV) or dtype != self._room_CV.dtype:
            return None
        room_MV, self._room_CV = self._room_CV[:rows], self._room_CV[rows:]
        return room_MV

    def _leaf(self, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(self.want_gradient)

    def _through_form(self, gradient_TV: Tensor, logits_TV: Tensor) -> Tensor:
        """The slope of the soft-cap, 1 - tanh^2, at these logits. Scale and temperature are one constant: see `gradient`."""
        if self.form.softcap is None:
            return gradient_TV
        return gradient_TV * (1 - (logits_TV * (self.temperature / self.form.softcap)).square())

    @torch.no_grad()
    def gradient(self, loss_C: Tensor) -> tuple[Tensor, Tensor]:
        """(d loss_C.sum() / dz [C, V], which tokens have any gradient [C] bool); z is what the head's product gave.

        The result lies in the memory of the logits or of a teacher's, which are used up.
        """
        readings = self._with_adjoints(loss_C)
        active_C = torch.zeros(len(self), dtype=torch.bool, device=self.logits_CV.device)
        for reading, adjoint_MK in readings:
            active_C[reading.rows] |= adjoint_MK.ne(0).any(-1)
        divergences = [(r, a) for r, a in readings if r.gradient_MV is not None]
        for reading, adjoint_M1 in divergences:
            for rows in kernels.tiles(reading.gradient_MV):
                reading.gradient_MV[rows].mul_(adjoint_M1[rows])
        if len(divergences) == len(readings) == 1 and divergences[0][0].index_M is None:
            return divergences[0][0].gradient_MV, active_C
        total_CV = self._of_logprobs([(r, a) for r, a in readings if r.ids_MK is not None])
        for reading, _ in divergences:
            whole = reading.index_M is None
            total_CV = total_CV.add_(reading.gradient_MV) if whole else _add_rows(total_CV, reading)
        return total_CV, active_C

    def _with_adjoints(self, loss_C: Tensor) -> "list[tuple[_Reading, Tensor]]":
        """The readings that the loss depends on, each with the gradient of its numbers, [M, K] or [M, 1]."""
        if not loss_C.requires_grad:
            return []
        leaves = [reading.leaf for reading in self._readings]
        adjoints = torch.autograd.grad(loss_C, leaves, torch.ones_like(loss_C), allow_unused=True)
        constant = self.form.scale / self.temperature
        return [
            (reading, _columns(adjoint) * constant)
            for reading, adjoint in zip(self._readings, adjoints, strict=True)
            if adjoint is not None
        ]

    def _of_logprobs(self, readings: "list[tuple[_Reading, Tensor]]") -> Tensor:
        """Gradient of the log-probabilities, in the place of the logits: a (1[v in ids] - p) for each of them."""
        out_CV, total_C = self.logits_CV, torch.zeros_like(self.logsumexp_C)
        spikes = []
        for reading, adjoint_MK in readings:
            total_C[reading.rows] += adjoint_MK.sum(-1)
            rows_M1 = torch.arange(len(self), device=out_CV.device)[reading.rows].unsqueeze(-1)
            at_ids_MK = self._through_form(adjoint_MK, out_CV[rows_M1, reading.ids_MK])
            spikes.append(((rows_M1, reading.ids_MK), at_ids_MK.to(out_CV.dtype)))
        if not readings:
            return out_CV.zero_()
        for rows in kernels.tiles(out_CV):
            gradient_TV = kernels.logprob_gradient(out_CV[rows], self.logsumexp_C[rows], total_C[rows])
            out_CV[rows] = self._through_form(gradient_TV, out_CV[rows])
        for where, value_MK in spikes:
            out_CV.index_put_(where, value_MK, accumulate=True)
        return out_CV


@dataclass(frozen=True, slots=True)
class _Reading:
    """Numbers that a loss has read, and what their gradient with respect to the logits is made of."""

    leaf: Tensor  # [M] or [M, K]
    index_M: Tensor | None
    ids_MK: Tensor | None = None  # of log-probabilities
    gradient_MV: Tensor | None = None  # of a divergence

    @property
    def rows(self) -> Tensor | slice:
        return slice(None) if self.index_M is None else self.index_M


def _columns(values: Tensor) -> Tensor:
    """[M] as [M, 1]; [M, K] as it is."""
    return values if values.ndim == 2 else values.unsqueeze(-1)


def _add_rows(total_CV: Tensor, reading: _Reading) -> Tensor:
    """total[index] += gradient, tile by tile."""
    for rows in kernels.tiles(reading.gradient_MV):
        total_CV.index_add_(0, reading.index_M[rows], reading.gradient_MV[rows].to(total_CV.dtype))
    return total_CV


@torch.no_grad()
def project(hidden_CH: Tensor, head: OutputHead, temperature: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Finished logits [C, V] of a head, in float32 or float64: product, bias, scale, soft-cap, temperature.

    They are written to `out`, if given, where nothing forbids it. Half-precision inputs are multiplied as they are and
    summed in float32, and the sum is kept: a logit of 30 rounded to bfloat16 is off by up to .06, its probability by 6 %.
    """
    z_CV = _product(hidden_CH, head.weight_VH, out)
    if head.bias_V is not None:
        z_CV += head.bias_V
    return z_CV if head.form == LogitForm() and temperature == 1.0 else head.form(z_CV) / temperature


def _product(hidden_CH: Tensor, weight_VH: Tensor, out: Tensor | None) -> Tensor:
    if weight_VH.dtype not in (torch.float16, torch.bfloat16):
        return torch.mm(hidden_CH, weight_VH.t(), out=out)
    if weight_VH.is_cuda:
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=torch.float32)
    # torch 2.13 has no such product on a CPU. A slice of the weight at a time, so that no float32 copy of it exists.
    hidden_CH = hidden_CH.float()
    rows = max(1, WIDENED_BYTES // (4 * weight_VH.shape[1]))
    slices = [hidden_CH @ weight_VH[v : v + rows].float().t() for v in range(0, len(weight_VH), rows)]
    return torch.cat(slices, dim=1, out=out)
