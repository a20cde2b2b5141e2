"""Teachers that read prompts of their own, by every kind of engine: their scores against those of a
forward by hand.

L response length, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.clients.health import Limits
from opd.clients.served_model import inspect_replicas
from opd.clients.served_teacher import ServedTeacher
from opd.config import LossConfig, TeacherSpec
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.ops.heads import load_head
from opd.servers.server_processes import ServerOptions, start_replica, stop_all
from opd.teachers import ColocatedTeacher, TeacherPool
from opd.types import Prompt, Rollout
from tests.support.processes import leave_vllm
from tests.support.turns import one_after_another

VOCAB, DEADLINE, TOLERANCE = 40, 120.0, 1e-5
WEIGHTS = {"hf": 0.5, "vllm": 0.25, "served": 0.25}  # of a mixture that reads every response


@pytest.fixture(scope="module")
def paths(tiny) -> dict[str, Path]:
    """Teacher, by what runs it -> its model: two of the same model read different prompts."""
    return {"hf": tiny.reversal, "vllm": tiny.addition, "served": tiny.addition}


@pytest.fixture(scope="module")
def served(paths, tmp_path_factory):
    """Our own scoring server, as the pool knows it."""
    log = tmp_path_factory.mktemp("scoring") / "log"
    path = str(paths["served"])
    replica = start_replica(ServerOptions(model=path, name="m", extra=["--backend", "hf"]), log)
    try:
        replica.wait_until_ready(DEADLINE)
        spec = TeacherSpec("served", path, ("any",), backend="server", urls=(replica.url,))
        model = inspect_replicas("--teacher served", spec.urls, path, None, timeout_s=DEADLINE)
        options = {"api_key": None, "shared_vocab": VOCAB, "needs_head": True}
        teacher = ServedTeacher(spec, model, LossConfig(), limits=Limits(), **options)
        yield teacher
        teacher.close()
    finally:
        stop_all([replica])


@pytest.fixture(scope="module")
def colocated(paths, device) -> list[ColocatedTeacher]:
    options = {"dtype": "float32", "trust_remote_code": False}
    path = str(paths["vllm"])
    engines = {
        "hf": HFEngine("hf", str(paths["hf"]), **options),
        "vllm": HiddenStateEngine(
            "vllm", path, tokenizer=path, max_model_len=64, kv_cache_gib=0.05, **options
        ),
    }
    yield [
        ColocatedTeacher(TeacherSpec(n, str(paths[n]), ("any",)), e, load_head(str(paths[n])))
        for n, e in engines.items()
    ]
    leave_vllm()


def rollouts() -> list[Rollout]:
    """Prompts and responses of different lengths; teachers' prompts are shorter, longer or the
    student's.
    """
    rng = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=rng).tolist()

    own = [
        {"hf": ids(1), "vllm": ids(30), "served": ids(17)},
        {"hf": ids(25)},
        {"vllm": ids(3), "served": ids(40)},
        {},
    ]
    return [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain="any", token_ids=ids(5 + i), teacher_ids=teachers),
            source="student",
            response_ids=ids(length),
            rollout_logprobs=None,
            finish_reason="length",
            policy_version=0,
        )
        for i, (teachers, length) in enumerate(zip(own, (1, 9, 4, 6), strict=True))
    ]


@torch.no_grad()
def by_hand(path: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[L, V] log-probabilities of a model at every token of a response behind a prompt."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits_SV = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    return logits_SV[len(prompt) - 1 : -1, :VOCAB].log_softmax(-1)


@pytest.mark.parametrize("payload", ["topk+hidden", "sampled"])
def test_scores_are_those_of_each_teacher_s_own_prompt(paths, served, colocated, payload):
    pool = TeacherPool(
        colocated,
        {"any": tuple(WEIGHTS.items())},
        LossConfig(support_k=VOCAB),
        payload=payload,
        cache_bytes=1 << 30,
        shared_vocab=VOCAB,
        device=torch.device("cpu"),
        turns=one_after_another(colocated),
        served=[served],
    )
    samples = rollouts()
    for rollout, scores in zip(samples, pool.score(samples), strict=True):
        assert {s.teacher: s.weight for s in scores} == WEIGHTS
        for score in scores:
            prompt, response = rollout.prompt.ids_for(score.teacher), rollout.response_ids
            expected_LV = by_hand(paths[score.teacher], prompt, response)
            sampled_L = expected_LV[range(len(response)), response]
            torch.testing.assert_close(score.sampled_logprobs, sampled_L, atol=TOLERANCE, rtol=0)
            if payload == "sampled":
                continue
            found_LV = torch.empty_like(expected_LV).scatter(1, score.topk_ids, score.topk_logprobs)
            torch.testing.assert_close(found_LV, expected_LV, atol=TOLERANCE, rtol=0)
            weight_VH = load_head(str(paths[score.teacher])).weight_VH[:VOCAB]
            logprobs_LV = (score.hidden @ weight_VH.T).log_softmax(-1)
            torch.testing.assert_close(logprobs_LV, expected_LV, atol=TOLERANCE, rtol=0)


def test_another_prompt_gives_other_scores(paths):
    """So the test above would see a teacher that reads the student's."""
    (rollout, *_) = rollouts()
    own, students = (
        by_hand(paths["vllm"], prompt, rollout.response_ids)
        for prompt in (rollout.prompt.ids_for("vllm"), rollout.prompt.token_ids)
    )
    assert (own - students).abs().max() > 0.05
