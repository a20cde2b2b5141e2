"""The student: a Hugging Face causal LM under DeepSpeed.

Forward at the loss positions, backward, step, export.

B sequences, S padded length, N loss tokens of a micro-batch, C tokens of one chunk, V vocabulary, H
hidden size.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from opd import distributed
from opd.config import CHUNK_BYTES, ModelConfig, OptimConfig
from opd.distributed import resolve_dtype
from opd.engines.checkpoint_names import checkpoint_tensors, forget_prefixes
from opd.engines.deepspeed_engine import ShardedEngine
from opd.faults import fault_point
from opd.log import one_line
from opd.lora_config import LoraConfig
from opd.ops.attention import FLASH, attention_of, needs_padding_mask
from opd.ops.fused_linear import fused_linear_loss, score_hidden
from opd.ops.heads import OutputHead, logit_form
from opd.ops.logits import LogitsChunk
from opd.ops.lora import add_adapter, layout_of, merged_layer, trained_tensors
from opd.ops.model_class import model_class, vision_parameters
from opd.ops.packed_attention import PACKED, boundaries
from opd.ops.pixels import Pixels
from opd.types import LossOutput, MicroBatch

# (logits, rows, micro_batch, logprobs_N or None) -> (loss_C, {metric key: value_C})
TokenLoss = Callable[
    [LogitsChunk, slice, MicroBatch, Tensor | None], tuple[Tensor, dict[str, Tensor]]
]

# Statistics whose sums per domain are shares of the whole batch: statistic -> metric.
SHARES = {
    "distill/advantage_abs": "distill/advantage_share",
    "distill/has_gradient": "distill/gradient_token_share",
}


@dataclass(frozen=True)
class LossSettings:
    """How the student forms the logits of its loss."""

    temperature: float = 1.0
    shared_vocab: int | None = None  # tokens that all models know; None is all of the student's
    chunk_bytes: int = CHUNK_BYTES
    packing: bool = False  # sequences of a micro-batch end to end, without padding
    domains: tuple[str, ...] = ()  # statistics are summed for each of them too
    # Asks for a first pass that hands the loss the labels' log-probabilities [N] at that
    # temperature: sequence-level weights need all of them before the first token's loss.
    logprob_temperature: float | None = None


def learning_rate_at(step: float, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate at `step` (0-based, inner updates are fractions): pure, so that a resume
    has nothing to restore.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * min(1.0, (step + 1) / optim.warmup_steps)
    if optim.lr_schedule == "constant":
        return optim.learning_rate
    done = min(1.0, (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps))
    decay = 1 - done if optim.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.learning_rate * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * max(0.0, decay))


class _ModelWithLoss(nn.Module):
    """The model and its loss in one forward.

    Under ZeRO-3 parameters are whole only inside the forward of a module that DeepSpeed hooks, and
    the loss needs `lm_head.weight` itself, not its output; so the loss lives here and the weight is
    registered as external.
    """

    def __init__(self, model: nn.Module, settings: LossSettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.form = logit_form(model.config)
        self.needs_mask = needs_padding_mask(model)
        # of other attentions transformers makes a mask of where positions start again
        self.has_boundaries = model.config._attn_implementation in (PACKED, FLASH)

    def forward(
        self,
        mb: MicroBatch,
        token_loss: TokenLoss | None,
        logprob_temperature: float | None,
        seen: dict[str, Tensor],
    ):
        """With `token_loss`: (loss_sum [], stats key -> [N], logprobs_N or None).

        Without: the labels' logprobs_N alone. `seen` is what the model gets of the images.
        """
        hidden_NH = self._hidden_states(mb, seen)
        linear, settings = self.model.get_output_embeddings(), self.settings
        head = OutputHead(linear.weight, getattr(linear, "bias", None), self.form)
        logprobs_N = None
        if logprob_temperature is not None:
            logprobs_N = score_hidden(
                hidden_NH.detach(),
                head.weight_VH,
                mb.at_loss_tokens(mb.labels_BS),
                bias_V=head.bias_V,
                form=head.form,
                temperature=logprob_temperature,
                chunk_bytes=settings.chunk_bytes,
            ).sampled_logprobs_N
        if token_loss is None:
            return logprobs_N
        loss_sum, stats = fused_linear_loss(
            hidden_NH,
            head,
            lambda logits, rows: token_loss(logits, rows, mb, logprobs_N),
            temperature=settings.temperature,
            vocab=settings.shared_vocab,
            teachers=mb.teachers_per_token,
            chunk_bytes=settings.chunk_bytes,
        )
        stats["distill/has_gradient"] = stats.pop("has_gradient")
        return loss_sum, stats, logprobs_N

    def _hidden_states(self, mb: MicroBatch, seen: dict[str, Tensor]) -> Tensor:
        """[N, H] at the loss tokens, in row-major order, padded or packed."""
        if not self.settings.packing:
            inputs = {"input_ids": mb.input_ids_BS, **seen}
            if self.needs_mask:
                inputs["attention_mask"] = mb.attention_mask_BS
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state[
                mb.loss_mask_BS
            ]
        # Positions that start again at 0 say where the next sequence begins.
        real_BS = mb.attention_mask_BS
        inputs = {
            "input_ids": mb.input_ids_BS[real_BS],
            "position_ids": (real_BS.cumsum(-1) - 1)[real_BS],
        }
        inputs = {name: row_T.unsqueeze(0) for name, row_T in inputs.items()}
        if self.has_boundaries:
            inputs |= boundaries(real_BS.sum(-1), real_BS.shape[1])
        return self.model.base_model(**inputs, **seen, use_cache=False).last_hidden_state[
            0, mb.loss_mask_BS[real_BS]
        ]


class Student:
    """Owns the model and its optimizer. With `lora` only adapters are trained, and the model's own
    weights stay as they were loaded.

    Every method but `learning_rate_at` is collective under ZeRO-3.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        ds_config: dict,
        *,
        settings: LossSettings,
        device: torch.device,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ):
        """`seed` is that of the adapters' first values."""
        dtype = resolve_dtype(model.dtype)
        self.sharded = ShardedEngine(ds_config, optim, dtype=dtype)
        path, trust = model.student_model, model.trust_remote_code
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        self.model = model_class(config).from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust,
            attn_implementation=attention_of(
                path,
                model.attn_implementation,
                dtype=dtype,
                packed=settings.packing,
                trust_remote_code=trust,
            ),
        )
        forget_prefixes(self.model)
        self.lora = layout_of(self.model, lora) if lora is not None else None
        if self.lora is not None:
            add_adapter(self.model, self.lora, seed=seed)
        if self.sharded.stage != 3:
            self.model.to(device)
        if model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.device = device
        self.pixels = Pixels(path, trust)  # of a student that sees
        if model.freeze_vision:
            for parameter in vision_parameters(self.model):
                parameter.requires_grad_(False)
        _without_noise(self.model)
        wrapped = _ModelWithLoss(self.model, settings)
        self.engine = self.sharded.attach(
            wrapped, tuple(self.model.get_output_embeddings().parameters())
        )
        self._wrapped = wrapped

    def _seen(self, mb: MicroBatch) -> dict[str, Tensor]:
        """What the model is given beside token ids: nothing for a micro-batch without images."""
        return self.pixels.inputs_of(self.model, mb.images, mb.input_ids_BS.shape[1])

    def check_packing(self) -> None:
        """Packed rows must not see each other: state-space layers carry their state over, some
        attentions know no positions.

        ValueError if they do. Collective under ZeRO-3.
        """
        wrapped = self._wrapped
        assert wrapped.settings.packing
        ids_BS = torch.arange(2, 10).view(2, 4)
        blank_BS, mask_BS = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
        zero_B = torch.zeros(2, dtype=torch.long)
        mb = MicroBatch(
            input_ids_BS=ids_BS,
            labels_BS=ids_BS,
            attention_mask_BS=mask_BS,
            loss_mask_BS=mask_BS,
            rollout_logprobs_BS=blank_BS,
            task_advantages_B=zero_B.float(),
            domain_ids_B=zero_B,
            on_policy_B=zero_B.bool(),
        )
        kind = self.model.config.model_type
        try:
            packed_N = self.logprobs(mb, 1.0)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"--packing: {kind} cannot compute sequences that lie in one row "
                f"({one_line(error)}); give --packing false"
            ) from None
        wrapped.settings = replace(wrapped.settings, packing=False)
        padded_N = self.logprobs(mb, 1.0)
        wrapped.settings = replace(wrapped.settings, packing=True)
        difference = float((packed_N - padded_N).abs().max())
        # weights that are no numbers are found elsewhere
        if torch.isfinite(padded_N).all() and not difference < (
            1e-3 if self.model.dtype == torch.float32 else 0.3
        ):
            raise ValueError(
                f"--packing: {kind} mixes sequences that lie in one row (log-probabilities are off "
                f"by {difference:.2g}); give --packing false, or try another --attn_implementation"
            )

    def loss(self, mb: MicroBatch, token_loss: TokenLoss) -> LossOutput:
        """Sum of `token_loss` over the loss tokens, with its statistics summed overall and per
        domain.
        """
        settings, mb, seen = self._wrapped.settings, mb.to(self.device), self._seen(mb)
        loss_sum, stats, logprobs_N = self.engine(
            mb, token_loss, settings.logprob_temperature, seen
        )
        domain_ids_N = mb.at_loss_tokens(mb.domain_ids_B)
        return LossOutput(loss_sum, summarise(stats, domain_ids_N, settings.domains), logprobs_N)

    @torch.no_grad()
    def logprobs(self, mb: MicroBatch, temperature: float) -> Tensor:
        """The labels' log-probabilities [N], float32, under the current weights."""
        return self.engine(mb.to(self.device), None, temperature, self._seen(mb))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient.

        A loss that is not finite stops all ranks before the weights are touched.
        """
        fault_point("backward")
        (bad,) = distributed.all_reduce([float(not torch.isfinite(loss.detach()))], "max")
        if bad:
            raise distributed.Stop(
                "the loss is not finite; the weights are as they were before this step"
            )
        self.sharded.backward(loss, last=last)

    def step(self, learning_rate: float) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        fault_point("train.before_step")
        grad_norm = self.sharded.step(learning_rate)
        fault_point("train.after_step")
        if not math.isfinite(grad_norm):
            raise distributed.Stop(
                f"the gradient norm is {grad_norm}; the last checkpoint, if there is one, is whole"
            )
        return grad_norm

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.sharded.named_full_parameters(self.model)

    def full_layers(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The weights that the student computes with, layer by layer, adapters merged on the way,
        under the model's own names.
        """
        for layer in self.sharded.full_layers(self.model):
            yield layer if self.lora is None else merged_layer(layer, self.lora)

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same one by one, buffers that a checkpoint holds too; each is valid until the next
        layer is asked for.
        """
        for layer in self.full_layers():
            yield from layer

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same weights under the names, and in the shapes, of a checkpoint: what vLLM reads."""
        return checkpoint_tensors(self.model, self.full_layers())

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained of a student with adapters, as an adapter's file names it."""
        assert self.lora is not None
        return trained_tensors(self.sharded.trained_parameters(self.model))

    def place(self, *, states: bool, parameters: bool) -> int:
        return self.sharded.place(states=states, parameters=parameters)

    def settle(self) -> None:
        self.sharded.settle()

    def save_shards(self, directory: Path) -> None:
        self.sharded.save(directory)

    def load_shards(self, directory: Path) -> None:
        self.sharded.load(directory)


def _without_noise(model: nn.Module) -> None:
    """The student that trains is the student that samples: no dropout, no skipped layers, no jitter
    in routers.

    Families ask for theirs by many names, and all of them in training mode only. So does gradient
    checkpointing, for which its layers stay in that mode, with their own rates at zero.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if isinstance(value, float) and re.search("drop|jitter", name):
                    setattr(module, name, 0.0)


def summarise(
    stats: dict[str, Tensor], domain_ids_N: Tensor, domains: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """[N] statistics to (sum, count) under `key` and `key/domain`.

    NaN marks a token that a statistic does not cover.

    Those of SHARES give, beside their means, each domain's share of the sum.
    """
    metrics = {}
    for key, value_N in stats.items():
        covered_N = ~torch.isnan(value_N)
        value_N = value_N.double().masked_fill(~covered_N, 0)
        metrics[key] = (value_N.sum(), covered_N.sum())
        for index, domain in enumerate(domains):
            here_N = covered_N & (domain_ids_N == index)
            sum_here = value_N[here_N].sum()
            metrics[f"{key}/{domain}"] = (sum_here, here_N.sum())
            if key in SHARES:
                metrics[f"{SHARES[key]}/{domain}"] = (sum_here, value_N.sum())
    return metrics
