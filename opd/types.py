"""The carriers: what flows from prompts to rollouts to scores to micro-batches to a loss.

Shape legend
    P prompts per rank, G samples per prompt, B sequences in a micro-batch, S padded length after
    the shift, L response length of one rollout, N loss tokens in a micro-batch, M loss tokens of
    one teacher in a micro-batch, K support size, V vocabulary, H hidden size.

Alignment
    Lists and tensors on rollouts and scores are response-aligned: index t is response token t.
    Tensors in a MicroBatch are label-aligned: index t speaks about `labels_BS[:, t]`, the token
    that `input_ids_BS[:, : t + 1]` predicts. The change from one to the other happens once, in
    `opd/padding.py`. "Loss tokens" are the True entries of `loss_mask_BS` in row-major order;
    everything with a suffix N follows that order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from opd.pictures import PromptImages

RolloutSource = Literal["student", "dataset"]
FinishReason = Literal["stop", "length"]
# What a loss needs from a teacher, in ascending size; "topk+hidden" is both.
TeacherPayload = Literal["sampled", "topk", "hidden", "topk+hidden"]
CANARY_IDS = list(range(2, 10))  # tokens that every vocabulary has; what they mean does not matter


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question.

    The domain, the answer and the dataset's response ride on the item, never in a parallel list.
    """

    prompt_id: int  # index in the loaded prompt set: stable across epochs and resumes
    domain: str  # names the teacher
    token_ids: list[int]  # [prompt_len], rendered by the student's chat template
    target_ids: list[int] | None = None  # [L] a dataset response, for off-policy distillation
    answer: str | None = None  # for task rewards and evaluation
    images: PromptImages | None = None  # placeholders are expanded in `token_ids`
    text: str = ""  # its last user message, for functions of the user
    # teacher -> [prompt_len] what it reads in place of `token_ids`, where that is something else
    teacher_ids: dict[str, list[int]] = field(default_factory=dict)
    teacher_images: dict[str, PromptImages] = field(default_factory=dict)  # those of these

    def ids_for(self, teacher: str) -> list[int]:
        """The prompt as a teacher reads it."""
        return self.teacher_ids.get(teacher, self.token_ids)

    def images_for(self, teacher: str) -> PromptImages | None:
        """The images of the prompt as a teacher reads it."""
        return self.teacher_images.get(teacher, self.images)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that somebody reads."""
        return max(map(len, (self.token_ids, *self.teacher_ids.values())))

    def as_read_by(self, teacher: str) -> "Prompt":
        """The prompt of a teacher that writes."""
        ids, images = self.ids_for(teacher), self.images_for(teacher)
        return replace(self, token_ids=ids, images=images)


@dataclass(frozen=True, slots=True)
class OldPolicy:
    """What a log-prob server says about a response: the policy that the PPO ratio is against."""

    version: int  # of its weights
    logprobs: list[float]  # [L] at the sampling temperature
    entropy: list[float]  # [L] nats, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response.

    `response_ids` includes the stop token if one was sampled, and is never re-tokenised.
    """

    sample_id: str  # STEP/PLACE/GENERATION, unique in a run and the same on any number of ranks
    prompt: Prompt
    source: RolloutSource
    response_ids: list[int]  # [L]
    # [L] the sampler's, at the sampling temperature; None where nothing reads them
    rollout_logprobs: list[float] | None
    finish_reason: FinishReason
    policy_version: (
        int  # the student weights that sampled it; the oldest of them, if they changed on the way
    )
    # (version, start, end) of its tokens; () is one version for all
    policy_spans: tuple[tuple[int, int, int], ...] = ()
    old_policy: OldPolicy | None = None  # with --old_logprobs server
    reward: float | None = None  # the task reward, None when the run uses none
    task_advantage: float = 0.0  # group-relative, 0 when the run uses no task reward

    def __post_init__(self):
        assert len(self.response_ids) > 0, f"prompt {self.prompt.prompt_id}: an empty response"
        if self.rollout_logprobs is not None:
            assert len(self.rollout_logprobs) == len(self.response_ids), (
                f"prompt {self.prompt.prompt_id}: {len(self.rollout_logprobs)} log-probabilities "
                f"for {len(self.response_ids)} tokens"
            )

    def ids_within(self, vocab: int) -> list[int]:
        """`response_ids` as a teacher of so many tokens can be asked about them: a response ends at
        a token beyond them, which is no loss token, and what is said of it is not used.

        Example: [5, 6, 40] is [5, 6, 0] for 40 tokens.
        """
        *before, last = self.response_ids
        return [*before, last if last < vocab else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """What one teacher says about one response.

    Log-probabilities are over the teacher's full vocabulary at the loss temperature and never
    renormalised, so the mass outside the support is exact: 1 - sum(exp(topk_logprobs)).
    """

    teacher: str
    weight: (
        float  # share of this teacher in the prompt's mixture; the weights of a rollout sum to 1
    )
    sampled_logprobs: Tensor | None = (
        None  # [L] float32, log q(response_ids[t]); None where `hidden` says it all
    )
    entropy: Tensor | None = None  # [L] float32, nats; likewise
    logsumexp: Tensor | None = (
        # [L] float32, of the teacher's logits: from it, hidden states give any log-probability
        None
    )
    topk_ids: Tensor | None = None  # [L, K] int64, descending
    topk_logprobs: Tensor | None = None  # [L, K] float32
    hidden: Tensor | None = None  # [L, H] the hidden states that predict each response token


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSlice:
    """The loss tokens of a micro-batch that one teacher speaks about.

    `token_index_M` points into the N loss tokens.
    """

    teacher: str
    token_index_M: Tensor  # int64, ascending
    weights_M: Tensor  # float32
    sampled_logprobs_M: Tensor | None  # float32
    entropy_M: Tensor | None  # float32
    logsumexp_M: Tensor | None  # float32
    topk_ids_MK: Tensor | None
    topk_logprobs_MK: Tensor | None
    hidden_MH: Tensor | None

    def cut(self, start: int, stop: int) -> "TeacherSlice":
        """Entries `start` to `stop` of the M, as views."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "teacher"}
        return replace(
            self, **{name: None if t is None else t[start:stop] for name, t in tensors.items()}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Right-padded, label-aligned. `loss_mask_BS` is the only source of token counts."""

    input_ids_BS: Tensor  # int64, raw[:-1]
    labels_BS: Tensor  # int64, raw[1:]: a valid id everywhere, never -100
    attention_mask_BS: Tensor  # bool
    loss_mask_BS: Tensor  # bool, True where the label is a response token
    rollout_logprobs_BS: Tensor  # float32, 0 off-mask
    task_advantages_B: Tensor  # float32
    domain_ids_B: Tensor  # int64, index into the run's domains; -1 for filler rows
    on_policy_B: Tensor  # bool, the student wrote the response
    # float32, 0 off-mask: of the log-prob servers, or the student's before the step's first update;
    # None where nothing reads them
    old_logprobs_BS: Tensor | None = None
    teacher_slices: tuple[TeacherSlice, ...] = ()
    images: tuple[PromptImages | None, ...] = ()  # of each row; () where none has any

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask_BS.sum())

    @property
    def teachers_per_token(self) -> int:
        """The most teachers that speak about one token; at least 1."""
        indices = [part.token_index_M for part in self.teacher_slices]
        spoken_of = torch.cat(indices) if indices else torch.empty(0)
        return int(spoken_of.bincount().max()) if len(spoken_of) else 1

    @property
    def response_thirds_N(self) -> Tensor:
        """0, 1 or 2: whether a loss token stands in the front, the middle or the tail of its own
        response.
        """
        position_BS = self.loss_mask_BS.cumsum(-1) - 1
        length_B1 = self.loss_mask_BS.sum(-1, keepdim=True).clamp(min=1)
        return self.at_loss_tokens(3 * position_BS // length_B1)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device.

        A step's teacher states wait on the host for their turn.
        """
        return _moved(self, device)

    def at_loss_tokens(self, values: Tensor) -> Tensor:
        """[B, S] or [B] values at the N loss tokens."""
        if values.ndim == 1:
            values = values[:, None].expand(self.loss_mask_BS.shape)
        return values[self.loss_mask_BS]

    def from_loss_tokens(self, values_N: Tensor) -> Tensor:
        """[N] values in their places, [B, S], 0 elsewhere: the inverse of `at_loss_tokens`."""
        return values_N.new_zeros(self.loss_mask_BS.shape).masked_scatter(
            self.loss_mask_BS, values_N
        )

    def with_old_logprobs(self, logprobs_N: Tensor) -> "MicroBatch":
        """The same micro-batch with the old policy's log-probabilities, on whatever device they
        are.
        """
        return replace(
            self, old_logprobs_BS=self.from_loss_tokens(logprobs_N.to(self.loss_mask_BS.device))
        )


def _moved(item, device: torch.device):
    """A dataclass with its tensors, and those of its slices, on `device`."""
    moved = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        if isinstance(value, Tensor):
            moved[entry.name] = value.to(device, non_blocking=True)
        elif entry.name == "teacher_slices":
            moved[entry.name] = tuple(_moved(part, device) for part in value)
    return replace(item, **moved)


@dataclass(slots=True)
class LossOutput:
    """`loss_sum` is a sum over loss tokens, differentiable even when there are none."""

    loss_sum: Tensor  # []
    # key -> (sum [], count []), detached
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logprobs_N: Tensor | None = (
        None  # the labels', under the weights of this forward; None unless they were asked for
    )


@dataclass(slots=True)
class LoopState:
    """All that a synchronous resume needs beside the weights: prompts and seeds are functions of
    the step.
    """

    step: int = 0  # steps done; with `--inner_updates` each has several optimizer steps
    policy_version: int = 0  # version of the weights in the rollout engine
    tokens_seen: int = 0  # loss tokens trained on, over all ranks


class Sleeper(Protocol):
    """An engine that holds GPU memory only while it works; `tags` picks "weights" or "kv_cache"."""

    name: str
    awake: bool  # whether its weights are on the device

    def sleep(self) -> None: ...

    def wake(self, tags: list[str] | None = None) -> None: ...


class TeacherSleeper(Sleeper, Protocol):
    """A teacher, which the scheduler of turns may wake early and let sleep late."""

    can_sleep: bool  # False: it never gives its memory back
    bytes_awake: int  # what it holds on the device while awake: weights and KV cache
    bytes_prefetched: int  # what it holds there after `prefetch`

    def prefetch(self) -> None:
        """Starts to bring the weights without waiting for them; a later `wake` does."""

    def rest(self) -> None:
        """Gives up the KV cache, keeps the weights."""


class TeacherEngine(TeacherSleeper, Protocol):
    """What runs a teacher's model, whatever the library."""

    def hidden_states(
        self,
        sequences: list[list[int]],
        images: Sequence[PromptImages | None] | None = None,
        adapter: str = "",
    ) -> list[Tensor]:
        """Final hidden states [len, H] of each sequence, on the host; with the images of its
        prompt, and with one of the engine's adapters or none.
        """


class Offloadable(Protocol):
    """The student, parts of which leave the GPU while others work."""

    def place(self, *, states: bool, parameters: bool) -> int:
        """Says what has to be on the GPU: optimizer states, parameters.

        What may leave starts to; returns its bytes.
        """

    def settle(self) -> None:
        """Waits until what leaves has left and its GPU memory is free."""


class WeightSource(Protocol):
    """Yields the student's whole parameters as a checkpoint names and shapes them, or its adapter
    as the file of one does; collective.
    """

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]: ...

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightTarget(Protocol):
    """Takes the student's weights, or its adapter: the rollout engine."""

    policy_version: int
    takes_adapter: bool

    def load_weights(
        self, named_parameters: Iterable[tuple[str, Tensor]], version: int
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response. Log-probabilities are of the distribution that was sampled from."""

    token_ids: list[int]  # [L], the stop token included
    logprobs: list[float] | None  # [L]
    stopped: bool  # False: cut at the token limit
