"""Every role of an asynchronous run is killed at random moments: each sample is trained on exactly
once, within the bound.
"""

import argparse
import json

import pytest

from opd.records import sample_ledger
from scripts import chaos
from scripts.demos.mopd_async import Schedule, strike


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.parametrize("kills", [1, 3])
def test_kills_of_every_role(tmp_path, capsys, monkeypatch, kills):
    monkeypatch.delenv("OPD_FAULT", raising=False)
    wanted = ["--kills", str(kills * len(chaos.ROLES)), "--gap_s", "1", "--steps", "16"]
    status = chaos.main([*wanted, "--work_dir", str(tmp_path), "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and not result["problems"] and not result["left_alive"], result
    assert result["kills"] == dict.fromkeys(chaos.ROLES, kills), result
    assert result["samples"] == result["rounds"] * 16 * chaos.WORK.prompts


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda rows: rows.pop(3), "0/3/0: lost"),
        (lambda rows: rows.append(rows[0]), "0/0/0: trained on 2 times"),
        (lambda rows: rows.append({**rows[0], "id": "9/0/0"}), "9/0/0: not expected"),
        (
            lambda rows: rows[5].update(policy_version=-2),
            "1/1/0: trained on in step 2, 3 versions behind",
        ),
        (lambda rows: rows[5].update(tokens="other"), "1/1/0: tokens is 'other'"),
        (lambda rows: None, "final weights"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, spoil, problem):
    for name in ("calm", "round"):
        rows = [
            {"id": f"{step}/{place}/0", "step": step + 1, "policy_version": step, "tokens": "t"}
            for step in range(2)
            for place in range(chaos.WORK.prompts)
        ]
        if name == "round":
            spoil(rows)
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        (tmp_path / name / "model" / "model.safetensors").write_bytes(
            b"1" if problem != "final weights" else name.encode()
        )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / sample_ledger.FILE).write_text(text)
    size = {"steps": 2, "prompts": chaos.WORK.prompts, "max_staleness": 2}
    problems = chaos.problems_of(tmp_path / "round", **size, calm=tmp_path / "calm")
    assert any(problem in line for line in problems)


def test_a_schedule_kills_a_role_after_its_step_and_each_once():
    schedule = Schedule([strike("2:teacher"), strike("2:trainer"), strike("9:rollout")])
    asked = [schedule.victim(step) for step in (0, 1, 2, 2, 3, 8, 12, 13)]
    assert asked == [None, None, "teacher", "trainer", None, None, "rollout", None]
    for wrong in ("teacher", "x:teacher", "3:nobody"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{wrong}: give STEP:ROLE"):
            strike(wrong)


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    assert chaos.last_step(tmp_path) == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2')
    assert chaos.last_step(tmp_path) == 1
