"""A chunk of student logits: what a loss may read from it, and the one gradient that all readings
send back.

A loss never differentiates through a tensor of the vocabulary's size. It reads a few numbers per
token (log-probabilities, a divergence from a teacher), computes with them under autograd, and from
the gradient of each number the gradient of the logits is put together in closed form. So a loss
stays a few lines of torch on tensors of C numbers, and two tensors of C x V are all that exists:
the student's logits and the teacher's, whose room the divergence's gradient takes over.

Shape legend: C tokens of a chunk, M of them that one teacher speaks about, K ids per token, V
vocabulary, H hidden size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd.ops import kernels
from opd.ops.heads import LogitForm, OutputHead

SLICE = 8192  # rows of a head


class TeacherReading(NamedTuple):
    """What one teacher says about M tokens, at the chunk's temperature; log-probabilities and
    entropy in nats.
    """

    divergence_M: Tensor  # differentiable
    sampled_logprobs_M: Tensor
    entropy_M: Tensor
    topk_ids_MK: Tensor
    topk_logprobs_MK: Tensor


@dataclass(frozen=True, slots=True)
class ChunkGradient:
    """`scale_C1 * dlogits_CV` is the gradient; the scale is left to whoever multiplies with
    something smaller than V.
    """

    dlogits_CV: Tensor
    scale_C1: Tensor
    active_C: Tensor  # bool, the tokens that have any gradient


class LogitsChunk:
    """`logits_CV` are finished student logits, the head's form and the temperature included; the
    chunk owns their memory.

    A reading with `index_M` (int64, ascending) is about those rows only. `gradient` ends the
    chunk's life.
    """

    def __init__(
        self,
        logits_CV: Tensor,
        *,
        form: LogitForm,
        temperature: float,
        want_gradient: bool,
        gradient_dtype: torch.dtype | None = None,
        room_RV: Tensor | None = None,
    ):
        self.logits_CV, self.form, self.temperature = logits_CV, form, temperature
        self.want_gradient, self.gradient_dtype = want_gradient, gradient_dtype or logits_CV.dtype
        self._room_RV = room_RV  # for teachers' logits
        parts = [kernels.statistics(logits_CV[rows]) for rows in kernels.tiles(logits_CV)]
        self.logsumexp_C, self.entropy_C = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        self._readings: list[_Reading] = []
        self._top_ids_CK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits_CV)

    def logprobs(self, ids: Tensor, index_M: Tensor | None = None) -> Tensor:
        """Log-probabilities at `ids`, int64 [M] or [M, K], in the shape of `ids`;
        differentiable.
        """
        leaf = self._leaf(self.gather(ids, index_M))
        self._readings.append(_Reading(leaf, index_M, ids_MK=_columns(ids)))
        return leaf

    def gather(self, ids: Tensor, index_M: Tensor | None = None) -> Tensor:
        """The same values as `logprobs`, for looking only."""
        ids_MK = _columns(ids)
        if index_M is None:
            values_MK, logsumexp_M = self.logits_CV.gather(-1, ids_MK), self.logsumexp_C
        else:  # by two indices: rows of a vocabulary are not copied to pick K of them
            values_MK, logsumexp_M = (
                self.logits_CV[index_M.unsqueeze(-1), ids_MK],
                self.logsumexp_C[index_M],
            )
        return (values_MK - logsumexp_M.unsqueeze(-1)).view_as(ids)

    @property
    def vocab(self) -> int:
        return self.logits_CV.shape[1]

    def top_k(self, k: int, index_M: Tensor | None = None) -> Tensor:
        """Ids of the k likeliest tokens, [M, k] int64, descending."""
        if self._top_ids_CK is None or self._top_ids_CK.shape[1] < k:
            parts = [
                kernels.top_k(self.logits_CV[rows], k)[1] for rows in kernels.tiles(self.logits_CV)
            ]
            self._top_ids_CK = torch.cat(parts)  # asked for by every teacher and by the diagnostics
        ids_Ck = self._top_ids_CK[:, :k]
        return ids_Ck if index_M is None else ids_Ck[index_M]

    def divergence(
        self,
        teacher_hidden_MH: Tensor,
        head: OutputHead,
        labels_M: Tensor,
        index_M: Tensor | None = None,
        *,
        kind: str,
        jsd_beta: float,
        skew_alpha: float,
        topk: int = 0,
    ) -> TeacherReading:
        """Full-vocabulary divergence from the teacher with these hidden states, and its `topk`
        likeliest tokens.
        """
        assert len(teacher_hidden_MH) == (len(self) if index_M is None else len(index_M))
        room_MV = self._room(
            len(teacher_hidden_MH), torch.promote_types(head.weight_VH.dtype, torch.float32)
        )
        teacher_MV = project(teacher_hidden_MH, head, self.temperature, out=room_MV).to(
            self.logits_CV.dtype
        )
        form = {"kind": kind, "jsd_beta": jsd_beta, "skew_alpha": skew_alpha}
        tiles: list[TeacherReading] = []
        for rows in kernels.tiles(teacher_MV):
            mine = rows if index_M is None else index_M[rows]
            tile, gradient_TV = self._compare(mine, teacher_MV[rows], labels_M[rows], topk, form)
            tiles.append(tile)
            if len(gradient_TV) == len(teacher_MV):
                teacher_MV = gradient_TV  # the only tile
            else:  # the gradient takes the place of the teacher's logits
                teacher_MV[rows] = gradient_TV
        whole = TeacherReading(*map(torch.cat, zip(*tiles, strict=True)))
        leaf = self._leaf(whole.divergence_M)
        self._readings.append(_Reading(leaf, index_M, gradient_MV=teacher_MV))
        return whole._replace(divergence_M=leaf)

    @torch.no_grad()
    def _compare(
        self, mine: Tensor | slice, theirs_TV: Tensor, labels_T: Tensor, topk: int, form: dict
    ) -> tuple[TeacherReading, Tensor]:
        """One tile of `divergence`, and the gradient [T, V] of its divergence."""
        logits_TV = self.logits_CV[mine]
        logsumexp_T, entropy_T = kernels.statistics(theirs_TV)
        sampled_T = theirs_TV.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1) - logsumexp_T
        top_TK, topk_ids_TK = kernels.top_k(theirs_TV, topk)
        divergence_T, gradient_TV = kernels.divergence_and_gradient(
            logits_TV,
            self.logsumexp_C[mine],
            theirs_TV,
            logsumexp_T,
            gradient_dtype=self.gradient_dtype,
            **form,
        )
        top_TK = top_TK - logsumexp_T.unsqueeze(-1)
        reading = TeacherReading(divergence_T, sampled_T, entropy_T, topk_ids_TK, top_TK)
        return reading, self._through_form(gradient_TV, logits_TV)

    def _room(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """The next `rows` of the memory that was set aside, if they are left and fit."""
        if self._room_RV is None or rows > len(self._room_RV) or dtype != self._room_RV.dtype:
            return None
        room_MV, self._room_RV = self._room_RV[:rows], self._room_RV[rows:]
        return room_MV

    def _leaf(self, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(self.want_gradient)

    def _through_form(self, gradient_TV: Tensor, logits_TV: Tensor) -> Tensor:
        """The slope of the soft-cap, 1 - tanh^2, at these logits.

        Scale and temperature are one constant: see `gradient`.
        """
        if self.form.softcap is None:
            return gradient_TV
        return gradient_TV * (1 - (logits_TV * (self.temperature / self.form.softcap)).square())

    @torch.no_grad()
    def gradient(self, loss_C: Tensor) -> ChunkGradient:
        """d loss_C.sum() / dz, z being what the head's product gave.

        It takes the memory of the logits or of a teacher's.
        """
        readings = self._with_adjoints(loss_C)
        active_C = torch.zeros(len(self), dtype=torch.bool, device=self.logits_CV.device)
        for reading, adjoint_MK in readings:
            active_C[reading.rows] |= adjoint_MK.ne(0).any(-1)
        divergences = [(r, a) for r, a in readings if r.gradient_MV is not None]
        # one teacher, and only it
        if len(divergences) == len(readings) == 1 and divergences[0][0].index_M is None:
            return ChunkGradient(divergences[0][0].gradient_MV, divergences[0][1], active_C)
        total_CV = self._of_logprobs([(r, a) for r, a in readings if r.ids_MK is not None])
        for reading, adjoint_M1 in divergences:
            for rows in kernels.tiles(reading.gradient_MV):
                mine = rows if reading.index_M is None else reading.index_M[rows]
                total_CV[mine] += reading.gradient_MV[rows] * adjoint_M1[rows]
        return ChunkGradient(total_CV, torch.ones_like(self.logsumexp_C).unsqueeze(-1), active_C)

    def _with_adjoints(self, loss_C: Tensor) -> "list[tuple[_Reading, Tensor]]":
        """The readings that the loss depends on, each with the gradient of its numbers, [M, K] or
        [M, 1].
        """
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
        """Gradient of the log-probabilities, in the place of the logits: a (1[v in ids] - p) for
        each of them.
        """
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
            gradient_TV = kernels.logprob_gradient(
                out_CV[rows], self.logsumexp_C[rows], total_C[rows]
            )
            out_CV[rows] = self._through_form(gradient_TV, out_CV[rows])
        for where, value_MK in spikes:
            out_CV.index_put_(where, value_MK, accumulate=True)
        return out_CV


@dataclass(frozen=True, slots=True)
class _Reading:
    """Numbers that a loss has read, and what their gradient with respect to the logits
    is made of.
    """

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


@torch.no_grad()
def project(
    hidden_CH: Tensor, head: OutputHead, temperature: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Finished logits [C, V] of a head, in float32 or float64: product, bias, scale, soft-cap,
    temperature.

    They are written to `out`, if given, where nothing forbids it. Half-precision inputs are
    multiplied as they are and summed in float32, and the sum is kept: a logit of 30 rounded to
    bfloat16 is off by up to .06, its probability by 6 %.
    """
    z_CV = _product(hidden_CH, head.weight_VH, out)
    if head.bias_V is not None:
        z_CV += head.bias_V
    if head.form != LogitForm() or temperature != 1.0:
        for rows in kernels.tiles(z_CV):
            z_CV[rows] = head.form(z_CV[rows]) / temperature
    return z_CV


def _product(hidden_CH: Tensor, weight_VH: Tensor, out: Tensor | None) -> Tensor:
    """hidden @ weight.T, in float32 at least."""
    if weight_VH.is_cuda:
        wide = (
            {}
            if weight_VH.dtype in (torch.float32, torch.float64)
            else {"out_dtype": torch.float32}
        )
        return torch.mm(hidden_CH, weight_VH.t(), **wide)
    wide_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
    if wide_dtype == weight_VH.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out=out)
    # torch 2.13 has no product of bfloat16 into float32 on a CPU. A slice of the weight is widened
    # at a time, so that no float32 copy of the whole exists.
    if out is None:
        out = hidden_CH.new_empty(len(hidden_CH), len(weight_VH), dtype=wide_dtype)
    hidden_CH = hidden_CH.to(wide_dtype)
    for v in range(0, len(weight_VH), SLICE):
        torch.mm(hidden_CH, weight_VH[v : v + SLICE].to(wide_dtype).t(), out=out[:, v : v + SLICE])
    return out
