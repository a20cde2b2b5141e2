"""Every role of an asynchronous run is killed at random moments: each sample is trained on exactly
once, within the bound.
"""

import json

import pytest

from opd.records import sample_ledger
from scripts import chaos

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
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
    fleet = chaos.Fleet({}, tmp_path, tmp_path, steps=2)
    assert any(
        problem in line
        for line in chaos.problems_of(fleet, tmp_path / "round", 2, tmp_path / "calm")
    )
