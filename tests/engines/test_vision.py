"""Families that see, through transformers: a batch with and without images is each row alone."""

import pytest
import torch
from transformers import AutoConfig

from opd.engines.hf_engine import HFEngine
from opd.inputs.models import load_tokenizer, read_fact
from opd.ops.heads import load_head
from opd.ops.model_class import model_class, vision_parameters
from opd.ops.pixels import Pixels
from tests.support import vision


@pytest.fixture(scope="module", params=[*vision.FAMILIES])
def model(request, tmp_path_factory):
    """(path, its processor) of a tiny model."""
    path = tmp_path_factory.mktemp(request.param)
    vision.FAMILIES[request.param](path)
    return str(path), Pixels(str(path))


def rows_of(pixels: Pixels):
    """(ids of prompt and response, images) of three rows: one image, none, two."""
    one, two = vision.picture(1), vision.picture(2, 72, 60)
    first = vision.prompt_images(pixels, "1{}2=", one)
    last = vision.prompt_images(pixels, "{}a{}b", two, one)
    rows = [first, (vision.some_text(0, 5), None), last]
    return [(ids + vision.some_text(i, 4), images) for i, (ids, images) in enumerate(rows)]


def test_rows_of_a_batch_are_each_row_alone(model):
    path, pixels = model
    engine = HFEngine("teacher", path, dtype="float32", trust_remote_code=False, residency="gpu")
    sequences, images = zip(*rows_of(pixels), strict=True)
    together = engine.hidden_states(list(sequences), list(images))
    for ids, own, hidden_LH in zip(sequences, images, together, strict=True):
        (alone_LH,) = engine.hidden_states([ids], [own])
        torch.testing.assert_close(hidden_LH, alone_LH, atol=2e-5, rtol=1e-4)
    blind = [images[0], None, images[2]]
    blind[0] = vision.prompt_images(pixels, "1{}2=", vision.picture(9))[1]
    (other_LH,) = engine.hidden_states([sequences[0]], [blind[0]])
    assert (other_LH - together[0]).abs().max() > 1e-3, "the image is seen"


def test_hidden_states_and_head_say_what_the_whole_model_says(model):
    """With the processor's own call, which knows nothing of this project."""
    path, pixels = model
    ids, images = rows_of(pixels)[2]
    engine = HFEngine("teacher", path, dtype="float32", trust_remote_code=False, residency="gpu")
    prompt = ids[: images.num_tokens]
    (hidden_LH,) = engine.hidden_states([prompt], [images])
    head = load_head(path)
    whole = model_class(AutoConfig.from_pretrained(path)).from_pretrained(path).eval()
    inputs = pixels.processor(
        text=[images.text], images=[images.open()], return_tensors="pt", add_special_tokens=False
    )
    assert inputs["input_ids"][0].tolist() == prompt
    with torch.no_grad():
        logits_LV = whole(**inputs).logits[0]
    ours_LV = head.form(torch.nn.functional.linear(hidden_LH, head.weight_VH, head.bias_V))
    torch.testing.assert_close(ours_LV, logits_LV, atol=2e-5, rtol=1e-4)


def test_what_is_joined_is_what_the_processor_joins(model):
    _, pixels = model
    first, _, last = rows_of(pixels)
    pixels.check_joined([first[1], last[1]])


def test_a_processor_that_makes_other_tokens_stops_the_teacher(model):
    path, pixels = model
    engine = HFEngine("teacher", path, dtype="float32", trust_remote_code=False, residency="gpu")
    ids, images = rows_of(pixels)[0]
    with pytest.raises(
        ValueError, match=r"teacher: its processor makes \d+ other tokens of a prompt"
    ):
        engine.hidden_states([ids[1:]], [images])


def test_what_is_frozen_is_all_but_the_text_model(model):
    path, _ = model
    whole = model_class(AutoConfig.from_pretrained(path)).from_pretrained(path)
    frozen = {id(parameter) for parameter in vision_parameters(whole)}
    names = [name for name, parameter in whole.named_parameters() if id(parameter) in frozen]
    others = [name for name, parameter in whole.named_parameters() if id(parameter) not in frozen]
    assert names and not any("language_model" in n or "text_model" in n for n in names)
    assert all("language_model" in n or "text_model" in n or "lm_head" in n for n in others)


def test_facts_are_read_without_weights(model):
    path, pixels = model
    fact = read_fact("--student_model", path, load_tokenizer(path), False, vllm=False)
    ids, images = rows_of(pixels)[0]
    assert fact.sees and set(fact.placeholder_ids) & set(ids[: images.num_tokens])
