"""Teachers that follow the student say what copies of it say that were kept by hand."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.config import TeacherSpec
from opd.engines.checkpoint_names import persistent_tensors
from opd.engines.hf_engine import HFEngine
from opd.inputs.content import content_hash
from opd.ops.heads import load_head
from opd.past import PastTeachers
from opd.teachers import ColocatedTeacher

IDS = [5, 6, 7, 8, 9, 10]
STEPS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Student:
    """A model whose weights change at every step, as a `Student`'s do."""

    def __init__(self, path, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
        self.generator = torch.Generator().manual_seed(0)

    def named_full_tensors(self):
        yield from ((name, t.detach()) for name, t in persistent_tensors(self.model))

    @torch.no_grad()
    def step(self):
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter += (0.05 * noise).to(parameter.dtype)


def teacher_of(path, past, dtype):
    spec = TeacherSpec(past, str(path), "*", backend="hf", past=past)
    engine = HFEngine(past, str(path), dtype=dtype, trust_remote_code=False)
    head = load_head(str(path)).in_type(DTYPES[dtype])
    return ColocatedTeacher(spec, engine, head)


def logits_of(teacher):
    (state_LH,) = teacher.engine.hidden_states([IDS])
    head = teacher.head
    return head.form(torch.nn.functional.linear(state_LH, head.weight_VH, head.bias_V))


@torch.no_grad()
def logits_by(model):
    return model(torch.tensor([IDS])).logits[0]


def averaged(copies, decay):
    """By hand, in float32, rounded once."""
    found = copy.deepcopy(copies[0]).float()
    with torch.no_grad():
        for kept in copies[1:]:
            for own, new in zip(found.parameters(), kept.parameters(), strict=True):
                own.copy_(decay * own + (1 - decay) * new.float())
    return found.to(copies[0].dtype)


@pytest.fixture(params=["untied", "tied"])
def path(request, tiny, tiny_tied):
    return tiny_tied if request.param == "tied" else tiny.student


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_the_copy_that_was_kept_by_hand(path, dtype):
    before = content_hash(str(path))
    student = Student(path, dtype)
    pasts = ("-1", "-3", "ema:.5")
    teachers = [teacher_of(path, past, dtype) for past in pasts]
    follow = PastTeachers(teachers, student)
    copies = []
    for step in range(STEPS + 1):
        if step:
            student.step()
        copies.append(copy.deepcopy(student.model))
        follow.follow(step)
        follow.follow(step)  # a push that is repeated takes no second step
        wanted = {
            "-1": copies[max(0, step - 1)],
            "-3": copies[max(0, step - 3)],
            "ema:.5": averaged(copies, 0.5),
        }
        for teacher in teachers:
            by_hand, own = wanted[teacher.name], teacher.engine.weights()
            if dtype == "float32":
                tolerance = {"rtol": 0, "atol": 1e-5}
                torch.testing.assert_close(logits_of(teacher), logits_by(by_hand), **tolerance)
            # an average may be rounded to the neighbour
            last_bit = {"rtol": 2**-7 if "ema" in teacher.name else 0, "atol": 1e-6}
            head = by_hand.get_output_embeddings().weight
            torch.testing.assert_close(teacher.head.weight_VH, head.detach(), **last_bit)
            for name, parameter in by_hand.named_parameters():
                if name != "lm_head.weight":
                    torch.testing.assert_close(own[name], parameter.detach(), **last_bit)
    assert (logits_by(copies[-1]) - logits_by(copies[-2])).abs().max() > 0.1  # they do differ
    assert content_hash(str(path)) == before  # mapped files are never written


def test_what_is_saved_goes_on_to_the_bit(path, tmp_path):
    student = Student(path, "float32")
    pasts = ("-1", "-2", "ema:.9")
    teachers = [teacher_of(path, past, "float32") for past in pasts]
    follow = PastTeachers(teachers, student)
    for step in range(4):
        follow.follow(step)
        if step == 2:
            follow.save(tmp_path)
            kept, generator = copy.deepcopy(student.model), student.generator.get_state()
        student.step()
    resumed = Student(path, "float32")
    resumed.model, resumed.generator = kept, torch.Generator()
    resumed.generator.set_state(generator)
    again = [teacher_of(path, past, "float32") for past in pasts]
    follow = PastTeachers(again, resumed)
    follow.load(tmp_path, 2)
    follow.follow(2)  # the push at its start
    resumed.step()
    follow.follow(3)
    for first, second in zip(teachers, again, strict=True):
        for name, tensor in first.engine.weights().items():
            assert torch.equal(tensor, second.engine.weights()[name]), name
        assert torch.equal(first.head.weight_VH, second.head.weight_VH)


def test_a_small_step_of_an_average_is_not_rounded_away(tiny):
    """With bfloat16 copies it would be: 1 + 2**-9 is 1 there."""
    student = Student(tiny.student, "bfloat16")
    teacher = teacher_of(tiny.student, "ema:.99", "bfloat16")
    follow = PastTeachers([teacher], student)
    name = "model.norm.weight"
    with torch.no_grad():
        student.model.model.norm.weight.fill_(1.0)
        follow.follow(0)
        student.model.model.norm.weight.fill_(1.125)
    for step in range(1, 200):
        follow.follow(step)
    assert teacher.engine.weights()[name].float().min() > 1.09
