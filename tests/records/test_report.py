"""The report of a run: figures by hand, intervals against theory, the command."""

import json
import subprocess
import sys

import numpy as np
import pytest

from opd.records.report import recovery_report, render_report, report_command, write_report
from tests.support.processes import ROOT


def report_of(before, after, teacher, domain="math") -> dict:
    teachers = {} if teacher is None else {domain: teacher}
    return recovery_report({domain: before}, {domain: after}, teachers, steps=3, wall_s=1.5)[
        "domains"
    ][domain]


def test_figures_by_hand():
    report = recovery_report(
        {"math": [0, 0, 1, 0], "code": [0.5, 0.5]},
        {"math": [1, 0, 1, 0], "code": [0.25, 0.75]},
        {"math": [1, 1, 1, 0], "code": [1, 1]},
        steps=20,
        wall_s=12.5,
    )
    assert list(report) == ["domains", "steps", "wall_s"] and list(report["domains"]) == [
        "math",
        "code",
    ]
    math = report["domains"]["math"]
    assert list(math) == ["student_before", "student_after", "teacher", "recovery", "ci95", "n"]
    assert (math["student_before"], math["student_after"], math["teacher"]) == (0.25, 0.5, 0.75)
    assert math["recovery"] == 0.5 and math["n"] == 4
    assert report["domains"]["code"]["recovery"] == 0.0
    assert report["steps"] == 20 and report["wall_s"] == 12.5
    json.dumps(report, allow_nan=False)


def test_the_interval_of_two_prompts_by_hand():
    """Four equally likely draws: recovery 1, 1/2, 1/2 and 0."""
    assert report_of([0, 0], [1, 0], [1, 1])["ci95"] == [0.0, 1.0]


def test_prompts_stay_paired():
    """Every prompt recovers exactly half of its own gap, so no draw can say anything else."""
    generator = np.random.default_rng(1)
    before = generator.uniform(0, 0.5, size=40)
    teacher = before + generator.uniform(0.1, 0.5, size=40)
    entry = report_of(before, (before + teacher) / 2, teacher)
    assert entry["ci95"] == pytest.approx([0.5, 0.5], abs=1e-12)


def test_the_interval_has_the_width_of_theory():
    """With a gap of 1 everywhere the recovery is a mean of coin flips: +- 1.96 sqrt(p
    (1 - p) / n).
    """
    n = 400
    after = np.arange(n) < 0.3 * n
    entry = report_of(np.zeros(n), after.astype(float), np.ones(n))
    half = 1.96 * (0.3 * 0.7 / n) ** 0.5
    low, high = entry["ci95"]
    assert entry["recovery"] == pytest.approx(0.3) and low < 0.3 < high
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_the_interval_holds_the_point_and_repeats():
    generator = np.random.default_rng(2)
    before, after, teacher = (generator.random(30) < p for p in (0.2, 0.5, 0.8))
    first, second = (report_of(before.tolist(), after.tolist(), teacher.tolist()) for _ in range(2))
    assert first == second
    assert first["ci95"][0] <= first["recovery"] <= first["ci95"][1]


def test_the_order_of_domains_does_not_change_an_interval():
    generator = np.random.default_rng(3)
    scores = [{d: generator.random(9).tolist() for d in ("a", "b")} for _ in range(3)]
    turned = [dict(reversed(s.items())) for s in scores]
    one, other = (recovery_report(*s, steps=1, wall_s=1.0)["domains"] for s in (scores, turned))
    assert one["a"] == other["a"] and one["b"] == other["b"] and one["a"] != one["b"]


def test_no_gap_means_no_recovery():
    entry = report_of([1, 0], [1, 1], [0, 1])
    assert entry["recovery"] is None and entry["ci95"] is None and entry["teacher"] == 0.5
    noise = report_of([0.1 + 0.2, 0.0], [1.0, 1.0], [0.0, 0.3])  # 0.1 + 0.2 is not 0.3 in binary
    assert noise["recovery"] is None


def test_resamples_without_a_gap_are_left_out():
    """One of four prompts has the gap: (3/4)^4 of the draws miss it."""
    entry = report_of([0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1])
    assert entry["recovery"] == 1.0 and entry["ci95"] == [1.0, 1.0]


def test_a_domain_without_teacher_scores():
    entry = report_of([0, 1], [1, 1], None)
    assert entry == {
        "student_before": 0.5,
        "student_after": 1.0,
        "teacher": None,
        "recovery": None,
        "ci95": None,
        "n": 2,
    }


@pytest.mark.parametrize(
    ("before", "after", "teacher", "named"),
    [
        ({"a": [1]}, {"b": [1]}, {}, "domains"),
        ({"a": [1]}, {"a": [1]}, {"b": [1]}, "teacher scores for"),
        ({"a": [1, 0]}, {"a": [1]}, {}, r"a: \[2, 1\]"),
        ({"a": [1]}, {"a": [1]}, {"a": [1, 1]}, r"\[1, 1, 2\]"),
        ({"a": []}, {"a": []}, {}, r"\[0, 0\]"),
        ({"a": [float("nan")]}, {"a": [1]}, {}, "not finite"),
    ],
)
def test_scores_that_do_not_match_are_refused(before, after, teacher, named):
    with pytest.raises(ValueError, match=named) as caught:
        recovery_report(before, after, teacher, steps=1, wall_s=1.0)
    assert "\n" not in str(caught.value)


KEYS = ("student_before", "student_after", "teacher", "recovery", "ci95", "n")
REPORT = {
    "domains": {
        "math": dict(zip(KEYS, (0.1, 0.55, 0.6, 0.9, [0.8, 1.0], 200), strict=True)),
        "other": dict(zip(KEYS, (0.1, 0.2, None, None, None, 5), strict=True)),
    },
    "steps": 50,
    "wall_s": 1234.5,
}
TABLE = """\
domain    n  before  after  teacher  recovery    95 % interval
--------------------------------------------------------------
math    200   0.100  0.550    0.600     90.0%  80.0% to 100.0%
other     5   0.100  0.200        -         -                -
--------------------------------------------------------------
50 steps in 1,234 s; recovery is (after - before) / (teacher - before)"""


def test_the_table():
    assert render_report(REPORT) == TABLE


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = write_report(tmp_path, REPORT)
    assert path == tmp_path / "report.json" and json.loads(path.read_text()) == REPORT
    with pytest.raises(ValueError):
        write_report(tmp_path, {**REPORT, "wall_s": float("nan")})
    assert json.loads(path.read_text()) == REPORT
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_command(tmp_path):
    path = write_report(tmp_path, REPORT)
    command = [sys.executable, "-m", "opd.report", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert (
        done.stdout
        == f"{TABLE}\n\nreport:  {path}\ncurves:  tensorboard --logdir {tmp_path / 'tb'}\n"
    )


@pytest.mark.parametrize("content", [None, "{"])
def test_a_run_without_a_report_is_one_line_and_status_2(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert report_command([str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and str(tmp_path) in shown.err
