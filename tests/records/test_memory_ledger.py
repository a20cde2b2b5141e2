"""Peaks of memory, measured in fresh processes: `chunk_bytes` decides, not the number of tokens or
teachers.
"""

import pytest
import torch

from opd.ops.fused_linear import fused_linear_loss, score_hidden
from opd.ops.heads import LogitForm, OutputHead
from scripts.measure.tools import in_child, peak_extra_bytes

MIB = 1 << 20
BUDGET, N, V, H = 64 * MIB, 3000, 20_000, 32
# BLAS packs a copy of what it multiplies, of up to the budget, when it likes; its threads and the
# allocator keep some.
MOST = 2 * BUDGET + 100 * MIB


def peak_of_the_loss(teachers: int, temperature: float, softcap: float | None) -> int:
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH, theirs_NH, theirs_VH = (
        torch.randn(rows, H, generator=generator) for rows in (N, V, N, V)
    )
    hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    form = LogitForm(softcap=softcap)

    def token_loss(logits, rows):
        labels_C = torch.zeros(len(logits), dtype=torch.long)
        seen = [
            logits.divergence(
                theirs_NH[rows],
                OutputHead(theirs_VH, form=form),
                labels_C,
                kind="jsd",
                jsd_beta=0.5,
                skew_alpha=0.1,
            )
            for _ in range(teachers)
        ]
        return sum(reading.divergence_M for reading in seen), {}

    def run(tokens: int):
        head = OutputHead(weight_VH, form=form)
        loss_sum, _ = fused_linear_loss(
            hidden_NH[:tokens],
            head,
            token_loss,
            temperature=temperature,
            teachers=teachers,
            chunk_bytes=BUDGET,
        )
        loss_sum.backward()

    run(2)  # libraries allocate at their first use
    return peak_extra_bytes(lambda: run(N))


def peak_of_scoring() -> int:
    hidden_NH, weight_VH = torch.randn(N, H), torch.randn(V, H)
    score_hidden(hidden_NH[:2], weight_VH, torch.zeros(2, dtype=torch.long), support_k=64)
    run = lambda: score_hidden(  # noqa: E731
        hidden_NH, weight_VH, torch.zeros(N, dtype=torch.long), support_k=64, chunk_bytes=BUDGET
    )
    return peak_extra_bytes(run)


@pytest.mark.parametrize(
    ("teachers", "temperature", "softcap"), [(1, 1.0, None), (1, 1.7, 30.0), (4, 1.0, None)]
)
def test_the_loss_keeps_its_budget(teachers, temperature, softcap):
    """Full logits would be 229 MiB a tensor: 458 MiB for one teacher and 1,144 MiB for four."""
    peak = in_child(peak_of_the_loss, teachers, temperature, softcap)
    assert 0.5 * BUDGET < peak < MOST, peak / MIB


def test_scoring_keeps_its_budget():
    assert in_child(peak_of_scoring) < MOST
