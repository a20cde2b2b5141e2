"""What travels between trainer and server: round trips, and each thing that is not believed."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.clients import wire
from opd.clients.wire import BadAnswer, Question

V, H, K = 20, 8, 3
PAYLOADS = ("sampled", "topk", "hidden", "topk+hidden")


def question(payload="topk", length=4, **changes) -> Question:
    k = K if "topk" in payload else 0
    return Question(
        **{
            "prompt_ids": [1, 2],
            "response_ids": [3 + t for t in range(length)],
            "payload": payload,
            "support_k": k,
            "vocab": V,
            "hidden_size": H,
            **changes,
        }
    )


def answer_to(asked: Question) -> dict[str, torch.Tensor]:
    """What a model says that draws its logits at random."""
    L = len(asked.response_ids)
    generator = torch.Generator().manual_seed(L)
    logprobs_LV = torch.randn(L, V, generator=generator).log_softmax(-1)
    top, ids = logprobs_LV.topk(K, dim=-1)
    labels = torch.tensor(asked.response_ids, dtype=torch.long)
    fields = {
        "sampled_logprobs": logprobs_LV.gather(-1, labels[:, None]).squeeze(-1),
        "logsumexp": torch.randn(L, generator=generator),
        "entropy": torch.rand(L, generator=generator),
        "topk_ids": ids,
        "topk_logprobs": top,
        "hidden": torch.randn(L, H, generator=generator),
    }
    return {name: fields[name] for name in asked.shapes}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("length", [0, 1, 4])
def test_scores_come_back_as_they_were(payload, length):
    asked = question(payload, length)
    sent = answer_to(asked)
    body = wire.encode_arrays(sent)
    assert len(body) <= asked.most_bytes_binary
    found = wire.decode_scores(body, asked)
    assert found.keys() == sent.keys()
    assert all(
        torch.equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype
        for name in sent
    )


@pytest.mark.parametrize("dtype", wire.HIDDEN_DTYPES)
def test_hidden_states_keep_their_dtype(dtype):
    asked = question("hidden")
    sent = answer_to(asked)["hidden"].to(dtype)
    assert torch.equal(
        wire.decode_scores(wire.encode_arrays({"hidden": sent}), asked)["hidden"], sent
    )


@given(ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=50))
@settings(deadline=None)
def test_ids_come_back_as_they_were(ids):
    assert wire.decode_ids(wire.encode_ids(ids), vocab=V, most=50) == ids


@given(body=st.binary(max_size=64))
@settings(deadline=None)
def test_a_body_is_ids_of_the_vocabulary_or_a_value_error(body):
    try:
        ids = wire.decode_ids(body, vocab=V, most=8)
    except ValueError:
        return
    assert 1 <= len(ids) <= 8 and all(0 <= token < V for token in ids)


@pytest.mark.parametrize(
    "body", [b"", b"abc", wire.encode_ids([-1]), wire.encode_ids([V]), wire.encode_ids([1] * 9)]
)
def test_what_is_no_question_is_refused(body):
    with pytest.raises(ValueError):
        wire.decode_ids(body, vocab=V, most=8)


@given(body=st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_a_bad_answer_and_no_other_error(body):
    for decode in (wire.decode_scores, wire.decode_completion):
        with pytest.raises(BadAnswer):
            decode(body, question())


def test_a_truncated_answer_is_bad_wherever_it_ends():
    body = wire.encode_arrays(answer_to(question()))
    for end in range(0, len(body), 7):
        with pytest.raises(BadAnswer):
            wire.decode_scores(body[:end], question())


def test_a_pickle_is_a_bad_answer():
    with pytest.raises(BadAnswer):
        wire.decode_scores(pickle.dumps(answer_to(question())), question())


def edited(name: str, index, value):
    def edit(arrays):
        arrays[name] = arrays[name].clone()
        arrays[name][index] = value

    return edit


BAD_ANSWERS = {
    "a field is missing": (lambda a: a.pop("entropy"), "fields"),
    "a field too many": (lambda a: a.update(extra=torch.zeros(4)), "fields"),
    "a token is missing": (lambda a: a.update(entropy=a["entropy"][1:]), r"entropy is .* \(3,\)"),
    "a support that is smaller": (lambda a: a.update(topk_ids=a["topk_ids"][:, 1:]), "topk_ids is"),
    "another dtype": (
        lambda a: a.update(entropy=a["entropy"].double()),
        "entropy is torch.float64",
    ),
    "NaN": (edited("logsumexp", 1, float("nan")), "logsumexp is not finite"),
    "infinity": (edited("entropy", 0, float("inf")), "entropy is not finite"),
    "minus infinity": (edited("sampled_logprobs", 0, float("-inf")), "not finite"),
    "vLLM's minus infinity": (edited("sampled_logprobs", 0, -9999.0), "minus infinity"),
    "a probability above 1": (edited("sampled_logprobs", 0, 0.1), "a log-probability of 0.1"),
    "an id outside": (edited("topk_ids", (0, 0), V), f"token {V} is outside"),
    "a negative id": (edited("topk_ids", (0, 0), -1), "token -1 is outside"),
    "an id twice": (
        lambda a: a["topk_ids"].copy_(a["topk_ids"][:, :1].expand(4, K).clone()),
        "stands twice",
    ),
    "not descending": (
        lambda a: a.update(topk_logprobs=a["topk_logprobs"].flip(-1)),
        "not descending",
    ),
    "too much mass": (lambda a: a.update(topk_logprobs=torch.full((4, K), -0.5)), "sum to 1.82"),
}


@pytest.mark.parametrize("fault", BAD_ANSWERS)
def test_what_no_model_says_is_not_believed(fault):
    spoil, says = BAD_ANSWERS[fault]
    arrays = answer_to(question())
    spoil(arrays)
    with pytest.raises(BadAnswer, match=says):
        wire.decode_scores(wire.encode_arrays(arrays), question())


# ---- JSON ----------------------------------------------------------------------------------------


def completion_of(asked: Question, arrays) -> dict:
    """As vLLM writes it: the sampled token stands first, behind it the top-k, which may hold it
    too.
    """
    rows = [None] + [{"1": {"logprob": -1.0, "rank": 1, "decoded_token": "x"}}] * (
        len(asked.prompt_ids) - 1
    )
    for t, token in enumerate(asked.response_ids):
        row = {
            str(token): {
                "logprob": float(arrays["sampled_logprobs"][t]),
                "rank": V,
                "decoded_token": "y",
            }
        }
        for k in range(asked.support_k):
            entry = {
                "logprob": float(arrays["topk_logprobs"][t, k]),
                "rank": k + 1,
                "decoded_token": "z",
            }
            row[str(int(arrays["topk_ids"][t, k]))] = entry
        rows.append(row)
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": "q", "prompt_logprobs": rows}]}


@pytest.mark.parametrize("payload", ["sampled", "topk"])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_completion_is_read_into_the_same_fields(payload, length):
    asked = question(payload, length)
    sent = answer_to(asked)
    body = json.dumps(completion_of(asked, sent)).encode()
    assert len(body) <= asked.most_bytes_json
    found = wire.decode_completion(body, asked)
    assert set(found) == {"sampled_logprobs"} | (
        {"topk_ids", "topk_logprobs"} if payload == "topk" else set()
    )
    assert all(torch.equal(found[name], sent[name]) for name in found)


def test_a_completion_request_scores_and_does_not_write():
    request = wire.completion_request(question(), "math")
    assert (
        request["prompt"] == [1, 2, 3, 4, 5, 6]
        and request["max_tokens"] == 1
        and request["prompt_logprobs"] == K
    )


BAD_COMPLETIONS = {
    "no choices": (lambda c: c.update(choices=[]), "not a completion"),
    "two choices": (lambda c: c["choices"].append(c["choices"][0]), "not a completion"),
    "nothing of the prompt": (
        lambda c: c["choices"][0].update(prompt_logprobs=None),
        "no prompt_logprobs",
    ),
    "a position is missing": (
        lambda c: c["choices"][0]["prompt_logprobs"].pop(),
        "5 prompt_logprobs for 6 tokens",
    ),
    "a null": (
        lambda c: c["choices"][0]["prompt_logprobs"].__setitem__(4, None),
        "response token 2",
    ),
    "without the sampled token": (
        lambda c: c["choices"][0]["prompt_logprobs"][5].pop("6"),
        "response token 3",
    ),
    "a key that is no id": (
        lambda c: c["choices"][0]["prompt_logprobs"][5].update(x={"logprob": 0.0}),
        "not a completion",
    ),
    "a support that is too small": (
        lambda c: c["choices"][0]["prompt_logprobs"].__setitem__(
            5, {"6": {"logprob": -1.0, "rank": 9}}
        ),
        "0 candidates",
    ),
}


@pytest.mark.parametrize("fault", BAD_COMPLETIONS)
def test_a_completion_with_a_hole_is_not_believed(fault):
    spoil, says = BAD_COMPLETIONS[fault]
    asked = question()
    completion = completion_of(asked, answer_to(asked))
    spoil(completion)
    with pytest.raises(BadAnswer, match=says):
        wire.decode_completion(json.dumps(completion).encode(), asked)
