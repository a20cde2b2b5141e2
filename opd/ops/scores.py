"""What a model says about responses, from its hidden states: the same path for a colocated teacher,
a scoring server and a log-prob server, so that they say the same to the bit.

L length of one response, N tokens of all, H hidden size, K support size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.config import CHUNK_BYTES
from opd.ops.fused_linear import score_hidden
from opd.ops.heads import OutputHead
from opd.pictures import PromptImages
from opd.types import TeacherEngine

Ids = Sequence[int]


def response_states(
    engine: TeacherEngine,
    texts: Sequence[tuple[Ids, Ids]],
    images: Sequence[PromptImages | None] | None = None,
    adapter: str = "",
) -> list[Tensor]:
    """[L, H] of each (prompt ids, response ids), on the host: the state that predicts response
    token t is the one at its predecessor.

    `images` are those of each prompt, `adapter` is one of the engine's, or "" for its base.
    """
    sequences = [[*prompt, *response][:-1] for prompt, response in texts]
    states = engine.hidden_states(sequences, images or [None] * len(sequences), adapter)
    return [state[len(prompt) - 1 :] for (prompt, _), state in zip(texts, states, strict=True)]


def score_responses(
    states: Sequence[Tensor],
    responses: Sequence[Ids],
    head: OutputHead,
    *,
    support_k: int = 0,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[dict[str, Tensor]]:
    """What the head says of each response from its hidden states [L, H], all in one pass.

    `sampled_logprobs`, `logsumexp` and `entropy`, float32 [L], and with a `support_k` above 0
    `topk_ids`, int64, and `topk_logprobs` [L, K]: on the host. Raises ValueError as `score_hidden`.
    """
    lengths = [len(response) for response in responses]
    labels = [token for response in responses for token in response]
    scores = score_hidden(
        torch.cat(list(states)),
        head.weight_VH,
        torch.tensor(labels, dtype=torch.long, device=head.weight_VH.device),
        support_k=support_k,
        bias_V=head.bias_V,
        form=head.form,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    columns = {
        "sampled_logprobs": scores.sampled_logprobs_N,
        "logsumexp": scores.logsumexp_N,
        "entropy": scores.entropy_N,
        "topk_ids": scores.topk_ids_NK,
        "topk_logprobs": scores.topk_logprobs_NK,
    }
    parts = {
        name: values.cpu().split(lengths) for name, values in columns.items() if values is not None
    }
    return [{name: part[index] for name, part in parts.items()} for index in range(len(responses))]
