"""Sampler, student and a vLLM teacher of one model that sees, in one process: the same numbers for
prompts with and without images, before and after weights were pushed.
"""

import dataclasses
import gc

import pytest
import torch

from opd.clients.wire import LogprobQuestion, Question
from opd.config import ModelConfig, OptimConfig, RolloutConfig
from opd.engines.hf_engine import HFEngine
from opd.engines.vllm_engine import HiddenStateEngine
from opd.inputs.validation import load_ds_config
from opd.ops.heads import load_head
from opd.ops.model_class import vision_parameters
from opd.ops.pixels import Pixels
from opd.padding import collate
from opd.rollout import RolloutEngine, push_weights
from opd.servers.logprob_engine import LogprobScorer
from opd.servers.scoring_engine import Scorer
from opd.student import LossSettings, Student
from opd.types import Prompt, Rollout, TeacherScores
from tests.support import vision
from tests.support.processes import ROOT

OPTIONS = {"dtype": "float32", "max_model_len": 128, "trust_remote_code": False}
EOS, DOMAINS = 1, ("d",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sees")
    torch.manual_seed(0)
    vision.idefics3(path)
    return str(path)


@pytest.fixture(scope="module")
def student(device, model):
    config = ModelConfig(student_model=model, dtype="float32")
    ds_config = load_ds_config(str(ROOT / "ds_configs" / "zero0.json"))
    return Student(config, OptimConfig(), ds_config, settings=LossSettings(), device=device)


@pytest.fixture(scope="module")
def prompts(student):
    """One image, none, two."""
    one, two = vision.picture(1), vision.picture(2, 30, 20)
    shown = [
        vision.prompt_images(student.pixels, "1{}2=", one),
        (vision.some_text(0, 6), None),
        vision.prompt_images(student.pixels, "{}a{}", two, one),
    ]
    return [
        Prompt(prompt_id=i, domain="d", token_ids=ids, images=images)
        for i, (ids, images) in enumerate(shown)
    ]


@pytest.fixture(scope="module")
def sampler(device, model, student):
    engine = RolloutEngine(
        model,
        RolloutConfig(
            num_generations=2, max_response_tokens=8, rollout_kv_cache_gib=0.02, enforce_eager=True
        ),
        stop_ids=(EOS, student.pixels.processor.image_token_id),
        images_per_prompt=2,
        seed=0,
        **OPTIONS,
    )
    yield engine
    gc.collect()


def logprobs(student, rollouts):
    """(the student's, the sampler's) at all loss tokens."""
    unscored = (TeacherScores(teacher="", weight=1.0),)
    placeholders = (student.pixels.processor.image_token_id,)
    batch = [(rollout, unscored) for rollout in rollouts]
    mb = collate(batch, pad_id=0, domains=DOMAINS, placeholder_ids=placeholders)
    return student.logprobs(mb, 1.0), mb.at_loss_tokens(mb.rollout_logprobs_BS)


def test_the_sampler_is_the_student_after_two_pushes(student, sampler, prompts):
    """The encoder's weights change too: what the sampler had made of the images is dropped."""
    sampler.try_out(prompts)
    for version in range(3):
        if version:
            with torch.no_grad():
                for parameter in student.model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            push_weights(student, sampler, version)
        rollouts = sampler.generate(prompts, version)
        ours_N, theirs_N = logprobs(student, rollouts)
        assert len(ours_N) > 10
        torch.testing.assert_close(ours_N, theirs_N, atol=1e-4, rtol=0)
        blind = [
            Rollout(
                sample_id=r.sample_id,
                prompt=prompts[1],
                source="student",
                response_ids=r.response_ids,
                rollout_logprobs=r.rollout_logprobs,
                finish_reason="length",
                policy_version=version,
            )
            for r in rollouts[:2]
        ]
        ours_N, theirs_N = logprobs(student, blind)
        assert (ours_N - theirs_N).abs().max() > 1e-3, "the prompt is read"


def test_a_teacher_in_vllm_says_what_the_student_says(device, student, model, prompts):
    """Of the weights in its files, which the student's are no more: a fresh one."""
    config = ModelConfig(student_model=model, dtype="float32")
    ds_config = load_ds_config(str(ROOT / "ds_configs" / "zero0.json"))
    fresh = Student(config, OptimConfig(), ds_config, settings=LossSettings(), device=device)
    engine = HiddenStateEngine(
        "teacher", model, tokenizer=model, kv_cache_gib=0.02, images_per_prompt=2, **OPTIONS
    )
    sequences = [prompt.token_ids + vision.some_text(3, 4) for prompt in prompts]
    states = engine.hidden_states(sequences, [prompt.images for prompt in prompts])
    for ids, prompt, state_LH in zip(sequences, prompts, states, strict=True):
        seen = {} if prompt.images is None else fresh.pixels.inputs([prompt.images], len(ids))
        with torch.no_grad():
            output = fresh.model.base_model(input_ids=torch.tensor([ids]), use_cache=False, **seen)
        torch.testing.assert_close(state_LH, output.last_hidden_state[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="teacher: vLLM makes 12 tokens of a prompt with images"):
        engine.hidden_states([[*prompts[0].token_ids[:3], 9, 9]], [prompts[0].images])
    del engine


def test_padded_and_packed_rows_are_each_row_alone_and_images_are_learned_from(student, prompts):
    """Gradients of the encoder included."""
    rollouts = [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=prompt,
            source="student",
            response_ids=vision.some_text(i, 3 + i),
            rollout_logprobs=None,
            finish_reason="length",
            policy_version=0,
        )
        for i, prompt in enumerate(prompts)
    ]
    unscored = (TeacherScores(teacher="", weight=1.0),)

    def gradients(groups):
        student.model.zero_grad()
        for group in groups:
            mb = collate([(r, unscored) for r in group], pad_id=0, domains=DOMAINS)
            hidden_NH = student._wrapped._hidden_states(mb, student._seen(mb))
            hidden_NH.square().sum().backward()
        return {
            n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None
        }

    together, alone = gradients([rollouts]), gradients([[r] for r in rollouts])
    settings = student._wrapped.settings
    student._wrapped.settings = dataclasses.replace(settings, packing=True)
    packed = gradients([rollouts])
    student._wrapped.settings = settings
    assert together.keys() == alone.keys() == packed.keys()
    for found in (together, packed):
        for name, gradient in found.items():
            scale = alone[name].abs().max()
            assert (gradient - alone[name]).abs().max() <= 1e-4 * scale + 1e-6, name
    assert together["model.vision_model.embeddings.patch_embedding.weight"].abs().max() > 0


def test_what_is_frozen_is_what_reads_images(student):
    frozen = {id(p) for p in vision_parameters(student.model)}
    names = {n.split(".")[1] for n, p in student.model.named_parameters() if id(p) in frozen}
    assert names == {"vision_model", "connector"}


def test_servers_say_of_images_what_the_student_says(student, model, prompts):
    """Behind the wire: the engines of a log-prob server and of a scoring server."""
    responses = [vision.some_text(20 + i, 3 + i) for i in range(len(prompts))]
    whole = student.model
    scorer = LogprobScorer(whole, version=0, tokens_per_batch=256, pixels=Pixels(model))
    questions = [
        LogprobQuestion(p.token_ids, response, 1.0, p.images)
        for p, response in zip(prompts, responses, strict=True)
    ]
    found = scorer.score(questions)
    for prompt, response, answer in zip(prompts, responses, found, strict=True):
        rollout = Rollout(
            sample_id="0/0/0",
            prompt=prompt,
            source="student",
            response_ids=response,
            rollout_logprobs=answer["logprobs"].tolist(),
            finish_reason="length",
            policy_version=0,
        )
        ours_N, theirs_N = logprobs(student, [rollout])
        torch.testing.assert_close(ours_N, theirs_N, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="log-prob server: its processor makes 12 other tokens"):
        scorer.score([LogprobQuestion([5, 6], [7], 1.0, prompts[0].images)])

    engine = HFEngine("teacher", model, dtype="float32", trust_remote_code=False, residency="gpu")
    head = load_head(model)
    asked = [
        Question(p.token_ids, response, "hidden", 0, len(head.weight_VH), 1.0, 64, p.images)
        for p, response in zip(prompts, responses, strict=True)
    ]
    answers = Scorer(engine, head, torch.float32).score(asked)
    for prompt, response, answer in zip(prompts, responses, answers, strict=True):
        ids = [*prompt.token_ids, *response][:-1]
        (state_LH,) = engine.hidden_states([ids], [prompt.images])
        torch.testing.assert_close(
            answer["hidden"], state_LH[len(prompt.token_ids) - 1 :], atol=2e-5, rtol=1e-4
        )
