"""Small batches of student and teachers in float64, and the losses of them written out naively."""

import torch

from opd.config import LossConfig, TeacherSpec
from opd.distillation import compare, payload_of
from opd.ops.heads import LogitForm, OutputHead
from opd.ops.logits import LogitsChunk
from opd.padding import collate
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import Prompt, Rollout, TeacherScores
from train_mopd import token_loss

VOCAB, STUDENT_ROWS, K = 11, 13, 4  # the student's vocabulary is padded by two rows
CPU = torch.device("cpu")
DOMAINS = ["addition", "reversal", "both"]
MIXTURES = {"addition": [("A", 1.0)], "reversal": [("B", 1.0)], "both": [("A", 0.25), ("B", 0.75)]}
HIDDEN = {"A": 5, "B": 3}
CHUNKS = [1, 3, 5, 1000]


def randn(*shape, seed, scale=1.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    )


HEADS = {name: randn(VOCAB, size, seed=size) for name, size in HIDDEN.items()}


class Batch:
    """Six responses of three domains, all teachers' logits of every token, and the student's."""

    def __init__(self, temperature=1.0, payload="hidden"):
        domains = ("addition", "both", "reversal", "both", "addition", "reversal")
        lengths = [1 + (i * 3) % 5 for i in range(len(domains))]
        self.logits_NV = randn(sum(lengths), STUDENT_ROWS, seed=7, scale=2.0).requires_grad_()
        logits = self.logits_NV.detach()[:, :VOCAB].split(lengths)
        self.rollouts = [self._rollout(i, domain, logits[i]) for i, domain in enumerate(domains)]
        self.hidden = {
            (r.prompt.prompt_id, name): randn(
                len(r.response_ids), size, seed=10 * r.prompt.prompt_id + size
            )
            for r in self.rollouts
            for name, size in HIDDEN.items()
        }
        scored = [(r, self._scores(r, payload, temperature)) for r in self.rollouts]
        self.mb = collate(scored, pad_id=0, domains=DOMAINS)
        # the N, in their order
        self.tokens = [(r, t) for r in self.rollouts for t in range(len(r.response_ids))]

    def _rollout(self, i, domain, logits_LV):
        """The sampler is near the student, but it is not the student."""
        generator = torch.Generator().manual_seed(i)
        ids_L = torch.randint(VOCAB, logits_LV.shape[:1], generator=generator)
        logprobs_L = logits_LV.log_softmax(-1).gather(-1, ids_L[:, None])[:, 0]
        logprobs_L += 0.4 * torch.randn(ids_L.shape, generator=generator)
        return Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain=domain, token_ids=[1] * (1 + i % 3)),
            source="student",
            response_ids=ids_L.tolist(),
            finish_reason="stop",
            rollout_logprobs=logprobs_L.tolist(),
            policy_version=0,
            task_advantage=(i - 2.5) / 2,
        )

    def teacher_logits(self, rollout, name):
        return self.hidden[rollout.prompt.prompt_id, name] @ HEADS[name].T

    def _scores(self, rollout, payload, temperature):
        scores = []
        for name, weight in MIXTURES[rollout.prompt.domain]:
            logprobs_LV = (self.teacher_logits(rollout, name) / temperature).log_softmax(-1)
            sampled_L = logprobs_LV.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            top_LK, ids_LK = logprobs_LV.topk(K)
            content = {
                "hidden": {"hidden": self.hidden[rollout.prompt.prompt_id, name]},
                "topk": {"topk_ids": ids_LK, "topk_logprobs": top_LK},
                "topk+hidden": {
                    "topk_ids": ids_LK,
                    "topk_logprobs": top_LK,
                    "hidden": self.hidden[rollout.prompt.prompt_id, name],
                },
                "sampled": {},
            }[payload]
            if payload != "hidden":
                entropy_L = -(logprobs_LV.exp() * logprobs_LV).sum(-1)
                logsumexp_L = (self.teacher_logits(rollout, name) / temperature).logsumexp(-1)
                content |= {
                    "sampled_logprobs": sampled_L,
                    "entropy": entropy_L,
                    "logsumexp": logsumexp_L,
                }
            scores.append(TeacherScores(teacher=name, weight=weight, **content))
        return tuple(scores)

    def teachers_of(self, n, temperature):
        """(weight, probabilities [V]) of every teacher of token n."""
        rollout, t = self.tokens[n]
        return [
            (weight, (self.teacher_logits(rollout, name)[t] / temperature).softmax(-1))
            for name, weight in MIXTURES[rollout.prompt.domain]
        ]

    def student_of(self, n, temperature):
        """The student's probabilities [V] of token n, without its padding rows, differentiable."""
        return (self.logits_NV[n, :VOCAB] / temperature).softmax(-1)

    def label(self, n):
        rollout, t = self.tokens[n]
        return rollout.response_ids[t]


def in_chunks(function, count, chunk):
    """`function(rows) -> (loss_C, {name: stat_C})` over slices of `chunk` tokens, put together
    again.
    """
    parts = [function(slice(i, min(i + chunk, count))) for i in range(0, count, chunk)]
    stats = {key: torch.cat([part[1][key] for part in parts]) for key in parts[0][1]}
    return torch.cat([part[0] for part in parts]), stats


def head_of(name):
    return OutputHead(HEADS[name])


def chunk_of(batch, rows, cfg):
    """The student's logits as the fused loss hands them out: at the loss temperature, without the
    padding.
    """
    logits_CV = batch.logits_NV.detach()[rows, :VOCAB] / cfg.loss_temperature
    return LogitsChunk(
        logits_CV, form=LogitForm(), temperature=cfg.loss_temperature, want_gradient=True
    )


def attached(batch, rows, chunk, loss_C):
    """loss_C, differentiable in the batch's logits with the gradient that the chunk worked out."""
    grad_CV = torch.zeros_like(batch.logits_NV[rows])
    found = chunk.gradient(loss_C)
    grad_CV[:, :VOCAB] = found.dlogits_CV * found.scale_C1
    logits_CV = batch.logits_NV[rows]
    return loss_C.detach() + ((logits_CV - logits_CV.detach()) * grad_CV).sum(-1)


def run_compare(batch, cfg, chunk):
    def one(rows):
        logits = chunk_of(batch, rows, cfg)
        seen = compare(logits, rows, batch.mb, head_of=head_of, cfg=cfg)
        extra = {"student": seen.student_logprobs_C, "teacher": seen.teacher_logprobs_C}
        loss_C = (
            torch.zeros(0)
            if seen.divergence_C is None
            else attached(batch, rows, logits, seen.divergence_C)
        )
        return loss_C, {**seen.stats, **extra}

    return in_chunks(one, len(batch.tokens), chunk)


def gradient(values, batch):
    (grad,) = torch.autograd.grad(values.sum(), batch.logits_NV, retain_graph=True)
    return grad


def close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance), (
        (actual - expected).abs().max()
    )


def run_token_loss(batch, cfg, chunk=3, logprobs_N=None):
    teachers = [
        ColocatedTeacher(TeacherSpec(name, name, "*"), None, head_of(name)) for name in HEADS
    ]
    pool = TeacherPool(
        teachers,
        {},
        cfg,
        payload=payload_of(cfg),
        cache_bytes=1 << 30,
        shared_vocab=VOCAB,
        device=CPU,
        turns=iter,
    )
    if logprobs_N is None:
        logprobs_N = torch.zeros(len(batch.tokens))

    def one(rows):
        logits = chunk_of(batch, rows, cfg)
        loss_C, stats = token_loss(logits, rows, batch.mb, logprobs_N, teachers=pool, cfg=cfg)
        return attached(batch, rows, logits, loss_C), stats

    return in_chunks(one, len(batch.tokens), chunk)


def sampled_logprobs(batch, temperature=1.0):
    """(student's [N], differentiable; teachers' weighted [N])"""
    cfg = LossConfig(loss_temperature=temperature)
    student = torch.stack(
        [batch.student_of(n, temperature)[batch.label(n)].log() for n in range(len(batch.tokens))]
    )
    return student, naive_losses(batch, cfg, lambda p, q, label: q[label].log()).detach()


def naive_divergence(p, q, cfg, tail="exact"):
    """D(student p, teacher q) over outcomes with these probabilities; with a tail, p and q are a
    support's.
    """
    if tail == "bucket":
        p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
    elif tail == "renormalize":
        p, q = p / p.sum(), q / q.sum()
    jsd = cfg.jsd_beta * q + (1 - cfg.jsd_beta) * p
    a = cfg.skew_alpha
    parts = {
        "forward_kl": [(1, q, p)],
        "reverse_kl": [(1, p, q)],
        "jsd": [(cfg.jsd_beta, q, jsd), (1 - cfg.jsd_beta, p, jsd)],
        "skew_forward_kl": [(1, q, a * q + (1 - a) * p)],
        "skew_reverse_kl": [(1, p, a * p + (1 - a) * q)],
    }[cfg.loss]
    total = 0.0
    for weight, x, y in parts:
        total = total + weight * (x * (x / y).log()).sum()
        if tail == "generalized":
            total = total + weight * (y - x).sum()
    return total


def naive_losses(batch, cfg, of_teacher):
    """[N] of sum_i w_i of_teacher(p, q_i, label)."""
    return torch.stack(
        [
            sum(
                w * of_teacher(batch.student_of(n, cfg.loss_temperature), q, batch.label(n))
                for w, q in batch.teachers_of(n, cfg.loss_temperature)
            )
            for n in range(len(batch.tokens))
        ]
    )
