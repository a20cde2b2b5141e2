"""Scores of responses from hidden states, against logits of every position."""

import pytest
import torch

from opd.ops.heads import OutputHead
from opd.ops.scores import response_states, score_responses

V, H = 11, 5
TEXTS = [([3, 1], [4, 1, 5]), ([9], [2]), ([6, 5, 3], [])]


class Engine:
    """A token's hidden state is its row of a table."""

    table_VH = torch.randn(V, H, generator=torch.Generator().manual_seed(0))

    def hidden_states(self, sequences, images, adapter):
        return [self.table_VH[ids] for ids in sequences]


@pytest.mark.parametrize("support_k", [0, 3])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[2:]], ids=["some", "only an empty one"])
def test_a_response_is_scored_by_the_states_before_its_tokens(texts, support_k):
    head = OutputHead(torch.randn(V, H), torch.randn(V))
    states = response_states(Engine(), texts)
    scores = score_responses(
        states, [response for _, response in texts], head, support_k=support_k, temperature=0.7
    )
    for (prompt, response), state_LH, found in zip(texts, states, scores, strict=True):
        before = [*prompt, *response][len(prompt) - 1 : -1]
        assert torch.equal(state_LH, Engine.table_VH[before])
        logits_LV = (Engine.table_VH[before] @ head.weight_VH.T + head.bias_V) / 0.7
        logprobs_LV = logits_LV.log_softmax(-1)
        expected = {
            "sampled_logprobs": logprobs_LV[torch.arange(len(response)), response],
            "logsumexp": logits_LV.logsumexp(-1),
            "entropy": -(logprobs_LV.exp() * logprobs_LV).sum(-1),
        }
        if support_k:
            expected["topk_logprobs"], expected["topk_ids"] = logprobs_LV.topk(support_k)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values)
