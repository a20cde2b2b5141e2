"""Prompts that a function of the user makes for a teacher after the rollout, and what `prepare`
says of prompts that teachers alone read.
"""

import pytest

import train_mopd
from opd.inputs.arguments import parse
from opd.plan.job import make_job
from opd.plan.memory import teacher_cache
from opd.records.metrics import Metrics
from opd.run.feedback import FeedbackPrompts
from opd.run.prepare import prepare
from opd.run.step_log import log_own_prompts
from opd.types import Prompt, Rollout
from tests.support.processes import ROOT

pytestmark = pytest.mark.usefixtures("device")
MADE = "python:tests.support.feedback:hint"


@pytest.fixture
def start(tiny, tmp_path, monkeypatch):
    """A run that may begin, by its flags; its addition teacher is the one with prompts."""
    monkeypatch.chdir(ROOT)

    def start(*flags: str, train=None, teacher=None):
        argv = [
            *("--student_model", str(tiny.student), "--data", str(train or tiny.train)),
            *("--teacher", f"addition={teacher or tiny.addition}", f"reversal={tiny.reversal}"),
            *("--output_dir", str(tmp_path / "run"), "--eval_data", str(tiny.eval)),
            *("--max_prompt_tokens", "16", "--max_response_tokens", "8", "--resume", "auto"),
            *("--prompts_per_step", "8", "--ds_config", str(ROOT / "ds_configs/zero3.json")),
        ]
        return prepare(parse(train_mopd.Config, [*argv, *flags]))

    return start


def made(start, function: str = "hint", *flags: str, bound: str = "64"):
    value = f"addition=python:tests.support.feedback:{function}"
    return start("--teacher_prompt", value, "--max_teacher_prompt_tokens", bound, *flags)


def rollout(run, prompt: Prompt, text: str = "12") -> Rollout:
    ids = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Rollout(
        sample_id=f"0/{prompt.prompt_id}/0",
        prompt=prompt,
        source="student",
        response_ids=[*ids, run.tokenizer.eos_token_id],
        rollout_logprobs=None,
        finish_reason="stop",
        policy_version=0,
    )


def some(run, domain: str, count: int = 4) -> list[Prompt]:
    return [prompt for prompt in run.train_set.prompts if prompt.domain == domain][:count]


# ---- Functions -----------------------------------------------------------------------------------


def test_a_function_makes_the_last_user_message_or_nothing(start):
    run = made(start)
    feedback = FeedbackPrompts(run)
    prompts = [*some(run, "addition", 9), *some(run, "reversal", 9)]
    found = feedback.of([rollout(run, prompt, "123+") for prompt in prompts])
    own = [r.prompt for r in found if r.prompt.teacher_ids]
    assert 0 < len(own) < 9 and {prompt.domain for prompt in own} == {"addition"}
    for prompt in own:
        text = "".join(run.tokenizer.convert_ids_to_tokens(prompt.ids_for("addition")))
        assert text == f"<user>123+{prompt.answer}={prompt.text}<assistant>"
        assert prompt.ids_for("reversal") == prompt.token_ids and len(prompt.text) % 2 == 0
    same = [r.prompt for r in found if not r.prompt.teacher_ids]
    assert all(p in prompts for p in same) and any(p.domain == "addition" for p in same)


def told(run, feedback: FeedbackPrompts, prompts) -> list[Rollout]:
    """What is heard of responses while others are written, some of them twice."""
    heard: list[Rollout] = []
    hear = feedback.before(heard.append)
    for prompt in prompts:
        hear(rollout(run, prompt))
    hear(rollout(run, prompts[0]))
    return heard


def test_served_teachers_hear_of_the_same_prompts_and_a_function_is_asked_once(start, monkeypatch):
    run = made(start)
    asked: list[str] = []

    def say(prompt: Prompt, response: str, sample_id: str) -> str:
        asked.append(sample_id)
        return f"{response}{prompt.text}"

    monkeypatch.setitem(run.feedback, "addition", say)
    feedback, prompts = FeedbackPrompts(run), some(run, "addition")
    heard = told(run, feedback, prompts)
    found = feedback.of([rollout(run, prompt) for prompt in prompts])
    assert heard == [*found, found[0]] and all("addition" in r.prompt.teacher_ids for r in found)
    assert asked == [r.sample_id for r in found]
    feedback.of(found)
    assert len(asked) == 2 * len(found), "the next step asks anew: nothing is kept"
    plain = FeedbackPrompts(start())
    assert plain.before(None) is None and plain.before(asked.append) == asked.append


def test_too_long_ones_are_counted_and_the_students_is_read(start, tmp_path, monkeypatch, capsys):
    run = made(start, bound="12")
    lengths = {True: "1" * 30, False: ""}
    monkeypatch.setitem(
        run.feedback, "addition", lambda p, r, s: p.text + lengths[p.prompt_id % 4 == 0]
    )
    feedback, prompts = FeedbackPrompts(run), some(run, "addition", 8)
    found = feedback.of([rollout(run, prompt) for prompt in prompts])
    assert feedback.overlong == {"addition": 4}
    said = [line for line in capsys.readouterr().err.splitlines() if "over --max_teacher" in line]
    assert len(said) == 1 and "sample 0/0/0" in said[0]
    metrics = Metrics(tmp_path / "m", num_steps=1, domains=("addition", "reversal"))
    log_own_prompts(run, metrics, found, feedback.overlong)
    logged = metrics.flush(1)
    metrics.close()
    assert logged["teacher/own_prompt/addition"] == 0.5
    assert logged["teacher/overlong_prompt/addition"] == 0.5
    lengths_of = [len(p.token_ids) for p in prompts]
    assert logged["teacher/prompt_tokens/addition"] == pytest.approx(sum(lengths_of) / 8)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "KeyError: 'no\\nanswer'"),
        ("exits", "RuntimeError: tests.support.feedback:exits called sys.exit(0)"),
        ("gives_a_number", "it returned 3, not a text or None"),
        ("gives_nothing", "it returned ' ', not a text or None"),
        ("gives_half_a_character", "its text has half a surrogate pair"),
    ],
)
def test_a_function_that_fails_is_named_with_its_sample(start, function, said):
    run = made(start, function)
    (prompt, *_) = some(run, "addition")
    with pytest.raises(RuntimeError) as caught:
        FeedbackPrompts(run).of([rollout(run, prompt)])
    message = str(caught.value)
    assert message.startswith(
        f"--teacher_prompt of teacher addition python:tests.support.feedback:{function}: sample "
        f"0/{prompt.prompt_id}/0, prompt {prompt.prompt_id} (addition): "
    )
    assert "\n" not in message
    assert said.replace("3", str(len("12"))) in message


@pytest.mark.parametrize(
    ("function", "said"),
    [("nobody", "has no function nobody"), ("not_a_function", "has no function not_a_function")],
)
def test_a_function_that_is_not_there_ends_the_start(start, function, said):
    with pytest.raises(ValueError, match=f"tests.support.feedback {said}$"):
        made(start, function)


# ---- What `prepare` says -------------------------------------------------------------------------


def test_the_dry_run_shows_what_teachers_read(start, capsys):
    for flags, said in (
        (("--teacher_prompt", "addition={answer}={prompt}"), "--- teacher addition reads, "),
        (("--teacher_prompt", f"addition={MADE}", "--max_teacher_prompt_tokens", "64"),
         "teacher addition reads what tests.support.feedback:hint makes of a prompt and its "),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            start(*flags, "--dry_run")
        assert ended.value.code == 0 and said in capsys.readouterr().out


def test_a_longer_prompt_needs_a_longer_context_and_cache(start, tmp_path, tiny, tokenizer):
    long = "addition={prompt}" + "1" * 200
    plain, run = start(), start("--teacher_prompt", long, "--output_dir", str(tmp_path / "b"))
    addition, reversal = run.cfg.teachers
    longest = max(len(p.ids_for("addition")) for p in run.train_set.prompts)
    assert longest > 200 and run.length_for(addition) == longest + 8
    assert run.length_for(reversal) == run.engine_options["max_model_len"] == 24
    jobs = [
        make_job(r.cfg, r.facts.student, r.facts.teachers, r.plan.job.machine) for r in (plain, run)
    ]
    short, wide = (teacher_cache(job, "addition", 1) for job in jobs)
    assert wide[0] > short[0] and wide[1] > short[1]
    assert teacher_cache(jobs[0], "reversal", 1) == teacher_cache(jobs[1], "reversal", 1)
    line = r"teacher addition reads a prompt of up to \d+ tokens, .* it has a context of 512; "
    with pytest.raises(ValueError, match=line):
        start("--teacher_prompt", "addition={prompt}" + "1" * 500)
