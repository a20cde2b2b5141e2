"""vLLM's own server as a teacher that sees: what it scores and writes is what the model says."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from opd.clients.health import Limits
from opd.clients.served_checks import check_servers_see
from opd.clients.served_model import inspect_replicas
from opd.clients.served_teacher import ServedTeacher, write_with_servers
from opd.clients.token_route import read_tokens, token_request
from opd.clients.wire import BadAnswer, LogprobQuestion
from opd.config import LossConfig, TeacherSpec
from opd.ops.pixels import Pixels
from opd.pictures import Picture
from opd.servers.launch import launch_arguments
from opd.servers.logprob_engine import LogprobScorer, load_model
from opd.types import Prompt, Rollout
from tests.support import vision
from tests.support.processes import worker_environment
from tests.support.servers import VllmServer

SUPPORT, EOS = 4, 1
LIMITS = Limits(wait_s=120.0, timeout_s=60.0)


def turned_and_clear() -> Picture:
    """A picture that lies on its side, with an alpha channel: nobody opens such a file alike."""
    image = vision.picture(7, 24, 40).open().convert("RGBA")
    image.putalpha(90)
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    image.save(encoded, "png", exif=exif)
    return Picture.of(encoded.getvalue())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sees") / "model"
    torch.manual_seed(0)
    vision.idefics3(path)
    return path


@pytest.fixture(scope="module")
def server(path):
    """(URLs, what it says of itself)."""
    environment = worker_environment(
        VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1"
    )
    own = launch_arguments(["teacher", str(path), "--protocol", "json"]).extra
    started = VllmServer(path, "sees", environment, *own).ready()
    yield (started.url,), inspect_replicas("--teacher", [started.url], "sees", None, 300.0)
    started.stop()


@pytest.fixture(scope="module")
def scorer(path):
    options = {"attn_implementation": "sdpa", "trust_remote_code": False}
    model = load_model(str(path), dtype=torch.float32, **options)
    pixels = Pixels(str(path), False)
    return LogprobScorer(model, version=0, tokens_per_batch=512, pixels=pixels)


@pytest.fixture(scope="module")
def prompts(scorer):
    pixels = scorer.pixels
    shown = [
        vision.prompt_images(pixels, "1{}2=", vision.picture(1)),
        (vision.some_text(0, 6), None),
        vision.prompt_images(pixels, "{}a{}", vision.picture(2, 30, 20), turned_and_clear()),
    ]
    return [
        Prompt(prompt_id=i, domain="d", token_ids=ids, images=images)
        for i, (ids, images) in enumerate(shown)
    ]


def rollout(prompt: Prompt) -> Rollout:
    return Rollout(
        sample_id=f"0/{prompt.prompt_id}/0",
        prompt=prompt,
        source="student",
        response_ids=vision.some_text(prompt.prompt_id, 5),
        rollout_logprobs=None,
        finish_reason="length",
        policy_version=0,
    )


def test_scores_and_writes_what_the_model_says(server, scorer, prompts):
    urls, model = server
    spec = TeacherSpec("sees", "sees", ("d",), backend="server", urls=urls)
    cfg = LossConfig(support="teacher_topk", support_k=SUPPORT)
    vocab = scorer.vocab_size
    teacher = ServedTeacher(
        spec, model, cfg, limits=LIMITS, api_key=None, shared_vocab=vocab, needs_head=False
    )
    rollouts = [rollout(prompt) for prompt in prompts]
    try:
        found = teacher.collect([teacher.submit(r, "topk") for r in rollouts])
    finally:
        teacher.close()
    for scores, r in zip(found, rollouts, strict=True):
        question = LogprobQuestion(r.prompt.token_ids, r.response_ids, images=r.prompt.images)
        (expected,) = scorer.score([question])
        torch.testing.assert_close(scores.sampled_logprobs, expected["logprobs"], atol=1e-4, rtol=0)
        assert scores.topk_ids.shape == (len(r.response_ids), SUPPORT)
    written = write_with_servers(
        spec,
        model,
        prompts,
        limits=LIMITS,
        api_key=None,
        seeds=[0] * len(prompts),
        eos_ids=(EOS,),
        max_tokens=3,
        temperature=0.0,
        vocab=vocab,
    )
    for sample, prompt in zip(written, prompts, strict=True):
        seen = scorer.pixels.inputs_of(scorer.model, [prompt.images], len(prompt.token_ids))
        ids = torch.tensor([prompt.token_ids])
        greedy = scorer.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **seen
        )
        assert sample.token_ids == greedy[0, ids.shape[1] :].tolist()


def test_servers_are_shown_images_at_the_start(server, prompts):
    urls, model = server
    config = SimpleNamespace(
        teachers=[TeacherSpec("sees", "sees", ("d",), backend="server", urls=urls)]
    )

    def check(model, own: list[Prompt]) -> None:
        routes = {"d": (("sees", 1.0),)}
        check_servers_see(config, {"sees": model}, {"": SimpleNamespace(prompts=own)}, routes)

    check(model, prompts)
    longer = [*prompts[0].token_ids[:1], *prompts[0].token_ids]
    other = Prompt(prompt_id=9, domain="d", token_ids=longer, images=prompts[0].images)
    said = f"not take a prompt with images .*: it makes {len(longer) + 1} tokens .*; from token"
    with pytest.raises(ValueError, match=said):
        check(model, [other])
    blind = replace(model, protocol="binary", sees=False)
    with pytest.raises(ValueError, match="its servers see no images, and 2 prompts"):
        check(blind, prompts)
    check(blind, prompts[1:2])


def test_an_answer_about_another_text_is_not_taken(prompts):
    ids = [5, 9, 9, 6]
    good = {"choices": [{"token_ids": [3]}], "prompt_token_ids": ids}
    assert read_tokens(json.dumps(good).encode(), ids).choices[0].token_ids == [3]
    for bad in (
        good | {"prompt_token_ids": [5, 9, 6]},
        good | {"prompt_token_ids": [5, 9, 8, 6]},
        good | {"prompt_token_ids": None},
        good | {"choices": []},
        good | {"choices": [{"token_ids": ["a"]}]},
        [],
    ):
        with pytest.raises(BadAnswer):
            read_tokens(json.dumps(bad).encode(), ids)
    body = token_request("m", prompts[0].token_ids, prompts[0].images, max_tokens=1)
    assert body["token_ids"] == list(prompts[0].images.unexpanded_ids)
