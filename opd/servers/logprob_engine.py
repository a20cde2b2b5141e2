"""The trainer's forward without a trainer: log-probability and entropy of each response token, and
weights that change.

The model is built as `Student` builds it: the same class, attention and dtype, the base model's
hidden states at the tokens that predict the response, and `score_hidden` over the vocabulary chunk
by chunk in float32. One thread owns it (`ScoringThread`): it scores a batch or it loads, so
no batch sees two versions, and every answer says which one.

B sequences, S padded length after the shift, N response tokens, L of one question, V vocabulary, H
hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from opd.clients.wire import LogprobQuestion, encode_logprobs
from opd.engines.checkpoint_names import checkpoint_views, forget_prefixes
from opd.engines.hf_engine import batches
from opd.inputs.shapes import load_part
from opd.ops.attention import attention_of
from opd.ops.heads import OutputHead, logit_form
from opd.ops.model_class import model_class, sees_images
from opd.ops.pixels import Pixels
from opd.ops.scores import score_responses
from opd.weights.store import check_names


class VersionedBody(NamedTuple):
    """An answer and the version of the weights that gave it."""

    version: int
    body: bytes


def load_model(
    model: str, *, dtype: torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> nn.Module:
    """As `Student` loads it, for the forward only.

    ValueError with one line if weights are missing or do not load.
    """
    options = {
        "attn_implementation": attention_of(
            model, attn_implementation, dtype=dtype, trust_remote_code=trust_remote_code
        ),
        "trust_remote_code": trust_remote_code,
    }
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    load = model_class(config).from_pretrained
    found, info = load_part(
        "--model",
        model,
        "weights",
        lambda: load(model, dtype=dtype, output_loading_info=True, **options),
    )
    if info["missing_keys"]:  # transformers makes random ones up
        raise ValueError(
            f"--model {model}: lacks {len(info['missing_keys'])} weights, "
            f"{min(info['missing_keys'])} first"
        )
    forget_prefixes(found)
    return found.eval().requires_grad_(False)  # eval: the trainer switches dropout off


class LogprobScorer:
    """A model and the version of its weights: None until they are whole."""

    def __init__(
        self,
        model: nn.Module,
        *,
        version: int | None,
        tokens_per_batch: int,
        pixels: Pixels | None = None,
    ):
        """`pixels` is the processor of a model that sees."""
        self.model, self.version, self.tokens_per_batch = model, version, tokens_per_batch
        self.pixels = pixels if sees_images(model.config) else None
        self.form = logit_form(model.config)

    @property
    def vocab_size(self) -> int:
        """Ids below it may be asked about."""
        return min(
            len(self.model.get_input_embeddings().weight),
            len(self.model.get_output_embeddings().weight),
        )

    @property
    def sees(self) -> bool:
        """Whether questions may have images."""
        return self.pixels is not None

    def _seen(self, questions: Sequence[LogprobQuestion], padded_length: int) -> dict[str, Tensor]:
        """What the model gets beside token ids. ValueError if that is for other tokens."""
        if self.pixels is None:
            return {}
        for question in questions:
            self.pixels.check_tokens("log-prob server", question.prompt_ids, question.images)
        shown = [question.images for question in questions]
        return self.pixels.inputs_of(self.model, shown, padded_length)

    def score(self, questions: Sequence[LogprobQuestion]) -> list[dict[str, Tensor]]:
        """`logprobs` and `entropy`, float32 [L], of each. RuntimeError without whole weights."""
        if self.version is None:
            raise RuntimeError("stale: there are no whole weights")
        answers = [{"logprobs": torch.empty(0), "entropy": torch.empty(0)} for _ in questions]
        groups: dict[float, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            if question.response_ids:
                groups[question.temperature].append(index)
        for temperature, members in groups.items():
            for batch in batches(
                [questions[index].num_tokens for index in members], self.tokens_per_batch
            ):
                asked = [members[place] for place in batch]
                found = self._forward([questions[index] for index in asked], temperature)
                for index, answer in zip(asked, found, strict=True):
                    answers[index] = answer
        return answers

    def encode(self, arrays: dict[str, Tensor], question: LogprobQuestion) -> VersionedBody:
        """The answer as it is sent; asked for in the same turn as `score`, so the version is the
        one that scored.
        """
        return VersionedBody(self.version, encode_logprobs(arrays, question, self.version))

    @torch.no_grad()
    def _forward(
        self, questions: Sequence[LogprobQuestion], temperature: float
    ) -> list[dict[str, Tensor]]:
        device, longest = self.model.device, max(question.num_tokens for question in questions)
        texts = [[*question.prompt_ids, *question.response_ids] for question in questions]
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        start_B1 = torch.tensor(
            [[len(question.prompt_ids) - 1] for question in questions], device=device
        )
        end_B1 = torch.tensor([[len(text) - 1] for text in texts], device=device)
        position_S = torch.arange(longest - 1, device=device)
        real_BS = position_S < end_B1
        predicts_BS = real_BS & (position_S >= start_B1)
        states_BSH = self.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=real_BS,
            use_cache=False,
            **self._seen(questions, longest - 1),
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        responses = [question.response_ids for question in questions]
        scores = score_responses(
            states_BSH[predicts_BS].split([len(response) for response in responses]),
            responses,
            OutputHead(head.weight, getattr(head, "bias", None), self.form),
            temperature=temperature,
        )
        return [
            {"logprobs": found["sampled_logprobs"], "entropy": found["entropy"]} for found in scores
        ]

    @torch.no_grad()
    def load(self, directory: Path, version: int) -> None:
        """Copies a published version into the parameters, from its directory.

        After an exception there are no whole weights: `version` is None. ValueError if names,
        shapes and dtypes are not the model's: then the trainer computes with something else.
        """
        self.version = None
        parameters = checkpoint_views(self.model)
        with _read_version(directory) as (names, tensors):
            check_names(names, parameters)
            filled: set[int] = set()  # where values lie, to find tied ones
            for name, value in tensors:
                parameter = parameters[name]
                if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
                    raise ValueError(
                        f"{name}: {value.dtype} {tuple(value.shape)} was published, and the model "
                        f"has {parameter.dtype} {tuple(parameter.shape)}; --model and --dtype must "
                        "be the trainer's"
                    )
                if parameter.data_ptr() in filled and not torch.equal(
                    parameter, value.to(parameter.device)
                ):
                    raise ValueError(
                        f"{name}: is tied to another parameter, and was published with other values"
                    )
                parameter.copy_(value)
                filled.add(parameter.data_ptr())
        self.version = version


@contextmanager
def _read_version(directory: Path) -> Iterator[tuple[list[str], Iterator[tuple[str, Tensor]]]]:
    """(names, tensors) of a directory."""
    with ExitStack() as stack:
        shards = [
            stack.enter_context(safe_open(path, "pt"))
            for path in sorted(directory.glob("*.safetensors"))
        ]
        shard_of = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 - not a dictionary
        yield list(shard_of), ((name, shard.get_tensor(name)) for name, shard in shard_of.items())
