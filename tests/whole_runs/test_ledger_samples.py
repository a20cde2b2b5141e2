"""The sample ledger: what stands in it, how two are compared, and that a run killed anywhere leaves
the undisturbed one's.
"""

import json
import signal

import pytest

from opd.records.sample_ledger import FILE, SampleLedger, differences, read, sample_rows, token_hash
from opd.types import Prompt, Rollout, TeacherScores
from tests.support.launch import at_most_two, command, parameter_hash, start, succeed


def rollout_of(sample_id: str, response_ids=(7, 8)) -> Rollout:
    return Rollout(
        sample_id=sample_id,
        prompt=Prompt(prompt_id=3, domain="math", token_ids=[5, 6]),
        source="student",
        response_ids=list(response_ids),
        rollout_logprobs=None,
        finish_reason="stop",
        policy_version=2,
    )


def rows(*sample_ids: str, step: int = 1) -> list[dict]:
    scores = (TeacherScores(teacher="a", weight=0.5), TeacherScores(teacher="b", weight=0.5))
    return sample_rows([rollout_of(i) for i in sample_ids], [scores] * len(sample_ids), step=step)


def test_a_row_says_what_was_trained_on():
    (row,) = rows("2/0/1", step=3)
    assert row == {
        "id": "2/0/1",
        "prompt_id": 3,
        "domain": "math",
        "teachers": ["a", "b"],
        "policy_version": 2,
        "tokens": "f3e0813c89d0991f",
        "step": 3,
    }
    assert token_hash(rollout_of("0/0/0", (7, 9))) != row["tokens"]


def test_rows_stand_in_the_order_of_samples_and_a_resume_forgets_later_ones(tmp_path):
    ledger = SampleLedger(tmp_path)
    ledger.truncate(-1)  # no file yet
    ledger.record(rows("0/10/0", "0/2/1", "0/2/0", step=1))
    ledger.record(rows("1/0/0", step=2))
    assert [row["id"] for row in read(ledger.path)] == ["0/2/0", "0/2/1", "0/10/0", "1/0/0"]
    whole = ledger.path.read_text()
    ledger.path.write_text(whole + '{"id": "2/0/0", "st')  # a crash cut it short
    assert [row["step"] for row in read(ledger.path)] == [1, 1, 1, 2]
    ledger.truncate(2)
    assert ledger.path.read_text() == whole
    ledger.truncate(1)
    assert [row["step"] for row in read(ledger.path)] == [1, 1, 1]
    ledger.truncate(-1)
    assert read(ledger.path) == []


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / FILE).write_text("{\n" + json.dumps(rows("0/0/0")[0]) + "\n")
    with pytest.raises(ValueError, match="line 1 is no row of a sample ledger"):
        read(tmp_path / FILE)


def test_every_difference_is_said():
    expected = rows("0/0/0", "0/1/0", "0/2/0")
    assert differences(expected, expected[::-1]) == []
    found = [
        expected[0],
        expected[0],
        {**expected[1], "tokens": "f", "teachers": ["a"]},
        *rows("1/0/0"),
    ]
    assert differences(expected, found) == [
        "0/0/0: trained on 2 times",
        "0/1/0: teachers is ['a'], expected ['a', 'b']",
        f"0/1/0: tokens is 'f', expected '{expected[1]['tokens']}'",
        "0/2/0: lost",
        "1/0/0: not expected",
    ]


# ---- Real runs -----------------------------------------------------------------------------------

FLAGS = ("--num_steps", "4", "--save_every", "2", "--parity_every", "0", "--teacher_backend", "hf")
GKD = ("--lmbda", "0.5", "--seed", "1")  # some steps are the student's, some the data set's
# After the weights changed but before the ledger, after the ledger but before the metrics, after
# both but before the checkpoint.
STRIKES = {
    "train.after_step:kill@3": "train_mopd.py",
    "ledger.written:kill@3": "train_mopd.py",
    "metrics.flushed:kill@2": "train_gkd.py",
}


def flags_of(script: str) -> tuple[str, ...]:
    return (*FLAGS, *(GKD if script == "train_gkd.py" else ("--num_generations", "2")))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("script", "num_samples"),
    [pytest.param("train_mopd.py", 4 * 8 * 2, marks=pytest.mark.long), ("train_gkd.py", 4 * 8)],
)
def test_a_run_killed_anywhere_and_resumed_has_the_ledger_and_weights_of_an_undisturbed_one(
    models, tmp_path, script, num_samples
):
    def undisturbed():
        succeed(command(models, tmp_path / script, *flags_of(script), script=script))

    def struck(fault):
        arguments = command(models, tmp_path / fault, *flags_of(script), script=script)
        killed = start(arguments, OPD_FAULT=fault)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        succeed(arguments)

    strikes = [fault for fault, struck_script in STRIKES.items() if struck_script == script]
    at_most_two([undisturbed, *(lambda fault=fault: struck(fault) for fault in strikes)])
    expected = read(tmp_path / script / FILE)
    assert len({row["id"] for row in expected}) == len(expected) == num_samples
    assert [row["step"] for row in expected] == sorted(row["step"] for row in expected)
    assert all(
        int(row["id"].split("/")[0]) == row["policy_version"] == row["step"] - 1 for row in expected
    )
    for fault in strikes:
        assert differences(expected, read(tmp_path / fault / FILE)) == [], fault
        assert parameter_hash(tmp_path / fault) == parameter_hash(tmp_path / script), fault
    teachers = {tuple(row["teachers"]) for row in expected}
    named = models.teachers if script == "train_mopd.py" else ("default",)
    assert teachers == {(name,) for name in named}
