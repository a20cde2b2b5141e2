"""The asynchronous benchmark beyond its simulation: what is measured, and two runs side by side."""

import json
import string
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from scripts import bench_async
from scripts.measure import async_runs, run_pairs
from scripts.measure.async_model import Rates, decode_times
from scripts.measure.async_runs import Measured, Setting
from scripts.measure.runs import byte_tokenizer, silent_model

SETTING = Setting(steps=12, prompts=8, max_response_tokens=64)
RATES = Rates(
    decode_a=4e-3, decode_b=2e-4, max_batch=24, score=1e-4, train=6e-4, publish=0.05, load=0.02
)


def made_of(rates: Rates, side: str, seed: int = 0) -> Measured:
    """A run that took exactly what the rates say; a `split` one pushes for twice as long."""
    rates = replace(rates, publish=2 * rates.publish) if side == "split" else rates
    lengths_IB = (
        np.random.default_rng(seed)
        .geometric(1 / 12, size=(SETTING.steps, SETTING.prompts))
        .clip(max=64)
    )
    tokens_I = lengths_IB.sum(axis=1) + SETTING.prompts * SETTING.prompt_tokens
    phases = {
        "rollout": np.array([decode_times(lengths_B, rates).max() for lengths_B in lengths_IB]),
        "score": tokens_I * rates.score,
        "train": tokens_I * rates.train * 0.9,
        "sync": np.full(SETTING.steps, rates.publish + rates.load),
    }
    seconds_I = phases["rollout"] + phases["score"] + phases["sync"] + tokens_I * rates.train
    waited_I = phases["rollout"]
    if side == "async":  # responses are there when a step begins
        seconds_I, waited_I = seconds_I - waited_I, np.zeros(SETTING.steps)
    pause_I = np.full(SETTING.steps, rates.load)
    return Measured(seconds_I, phases, pause_I, waited_I, np.zeros(SETTING.steps), lengths_IB, 0.25)


def test_a_summary_has_ratios_of_means_and_the_median_over_runs():
    runs = {side: [made_of(RATES, side, seed) for seed in range(3)] for side in async_runs.SIDES}
    result = bench_async.summary(runs, SETTING)
    window = SETTING.window
    means = {
        side: sorted(run.seconds_I[window].mean() for run in of_side)[1]
        for side, of_side in runs.items()
    }
    assert result["speedup_measured"] == pytest.approx(means["sync"] / means["async"], rel=1e-2)
    assert result["speedup_measured_vs_split"] == pytest.approx(
        means["split"] / means["async"], rel=1e-2
    )
    idle = sorted(
        run.waited_I[window].sum() / run.seconds_I[window].sum() for run in runs["async"]
    )[1]
    assert result["trainer_idle_measured"] == pytest.approx(idle, abs=1e-3)
    assert [row["side"] for row in result["sides"]] == list(async_runs.SIDES)
    json.dumps(result)


# ---- The workload --------------------------------------------------------------------------------


@torch.no_grad()
def test_the_models_end_and_lengthen_responses_as_often_as_asked():
    setting = Setting()
    tokenizer = byte_tokenizer(512)
    model = silent_model(*setting.student, tokenizer, 0)
    async_runs.give_a_long_tail(model, tokenizer, setting)
    generator = torch.Generator().manual_seed(0)
    chances = {}
    for mode, letters in (("short", string.ascii_lowercase), ("long", string.ascii_uppercase)):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(letters)))
        ids_BS = ids[torch.randint(26, (4, 100), generator=generator)]
        chances[mode] = model(input_ids=ids_BS).logits.softmax(-1).mean(dim=(0, 1))
    eos, upper = (
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(list(string.ascii_uppercase)),
    )
    assert chances["short"][eos] == pytest.approx(setting.ends_short, rel=0.4)
    assert chances["short"][upper].sum() == pytest.approx(setting.lengthens, rel=0.6)
    assert chances["long"][eos] == pytest.approx(setting.ends_long, rel=0.4)
    assert chances["long"][upper].sum() + chances["long"][eos] == pytest.approx(1, abs=1e-3), (
        "it does not go back"
    )


def test_tokens_of_a_response_are_counted_from_its_text():
    for response, reason, tokens in (
        ("abC<eos>", "stop", 4),
        ("abC", "length", 3),
        ("<eos>", "stop", 1),
    ):
        assert (
            async_runs.response_tokens(json.dumps({"response": response, "finish_reason": reason}))
            == tokens
        )


@pytest.mark.e2e
@pytest.mark.long
def test_real_runs_of_all_sides(run_main):
    """Six short steps of tiny models: what is compared is the same work."""
    setting = Setting(
        steps=8,
        prompts=4,
        max_response_tokens=48,
        student=(1, 64),
        teacher=(1, 64),
        max_staleness=1,
    )
    runs = async_runs.run_all(setting, 1)
    lengths = {side: run.lengths_IB for side, (run,) in runs.items()}
    assert lengths["sync"].shape == (8, 4) and lengths["sync"].max() <= 48
    assert np.array_equal(lengths["sync"], lengths["split"]), (
        "same prompts, same seeds, same updates: the same samples"
    )
    result = bench_async.summary(runs, setting)
    sides = {row["side"]: row for row in result["sides"]}
    assert (
        sides["sync"]["staleness"]
        == sides["split"]["staleness"]
        == 0
        < sides["async"]["staleness"]
        <= 1
    )
    assert sides["sync"]["rollout_idle"] is None and 0 <= sides["async"]["rollout_idle"] <= 1
    for row in sides.values():
        assert row["step_s"] > 0 and 0 <= row["trainer_idle"] < 1
        assert row["rollout_s"] + row["score_s"] + row["train_s"] + row["sync_s"] < row["step_s"]
    assert result["speedup_measured"] == pytest.approx(
        sides["sync"]["step_s"] / sides["async"]["step_s"], rel=1e-2
    )
    assert all(
        value >= 0 for rates in result["measured_rates"] for value in rates["split"].values()
    )
    assert all(
        -1 < result[f"simulation_error_{name}"] < 10
        for name in ("sync", "split", "async", "async_own_rates")
    )


# ---- Two runs of one's own -----------------------------------------------------------------------


def recorded(directory, *steps: tuple[float, float, float | None]):
    """A run directory whose steps took so many seconds, gave so many samples per second, and waited
    so much of the time.
    """
    directory.mkdir()
    rows = [{"step": 0, "eval/score": 1.0}]
    for i, (seconds, samples, idle) in enumerate(steps):
        row = {"step": i + 1, "time/step": seconds, "perf/samples_per_second": samples}
        rows.append(row if idle is None else {**row, "perf/trainer_idle": idle})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_speed_is_read_from_two_runs(tmp_path):
    slow = recorded(tmp_path / "sync", (90.0, 0.1, None), (10.0, 8.0, None), (10.0, 8.0, None))
    fast = recorded(tmp_path / "async", (90.0, 0.1, 0.9), (5.0, 16.0, 0.1), (3.0, 80 / 3, 0.5))
    # 160 samples in 20 s against 160 in 8 s, 2 s of which were waited
    assert run_pairs.speed(slow, fast) == {"speedup_measured": 2.5, "trainer_idle_measured": 0.25}
    with pytest.raises(ValueError, match=r"nowhere: no metrics\.jsonl"):
        run_pairs.speed(slow, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="fewer than two steps"):
        run_pairs.speed(slow, recorded(tmp_path / "short", (1.0, 1.0, 0.0)))
    with pytest.raises(ValueError, match=r"sync: no perf/trainer_idle .* second"):
        run_pairs.speed(fast, slow)


def reported(directory, steps: int = 300, prompts: int = 128, **recoveries: float | None):
    directory.mkdir()
    domains = {
        name: {"recovery": value, "ci95": None if value is None else [value - 0.05, value + 0.05]}
        for name, value in recoveries.items()
    }
    (directory / "report.json").write_text(
        json.dumps({"domains": domains, "steps": steps, "wall_s": 1.0})
    )
    (directory / "config.yaml").write_text(f"prompts_per_step: {prompts}\nnum_generations: 2\n")
    return directory


def test_recovery_of_two_runs_stands_side_by_side(tmp_path):
    sync = reported(tmp_path / "sync", addition=0.92, reversal=None)
    ahead = reported(tmp_path / "async", addition=0.9, reversal=1.0)
    addition, reversal = run_pairs.recovery(sync, ahead)
    assert addition == {
        "domain": "addition",
        "steps": 300,
        "samples": 300 * 128 * 2,
        "sync": 0.92,
        "sync_ci95": [0.87, 0.97],
        "async": 0.9,
        "async_ci95": [0.85, 0.95],
    }
    assert reversal["sync"] is reversal["sync_ci95"] is None and reversal["async"] == 1
    for name, changes, message in (
        ("shorter", {"steps": 100}, "300 and 100 steps"),
        ("smaller", {"prompts": 64}, "76800 and 38400 samples"),
        (
            "other",
            {"subtraction": 1.0},
            "domains addition,reversal and addition,reversal,subtraction",
        ),
    ):
        other = reported(tmp_path / name, **{"addition": 0.9, "reversal": 1.0, **changes})
        with pytest.raises(ValueError, match=message):
            run_pairs.recovery(sync, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recovery"],
            "--recovery runs/quickstart: no report.json in it; bash scripts/quickstart.sh",
        ),
        (
            ["--recovery", "here", "there"],
            "--recovery here: no report.json in it; give the --output_dir of a run that has ended",
        ),
        (
            ["--recovery", "here"],
            "--recovery here: give two run directories, or none for the demo's",
        ),
        (
            ["--runs", "here", "there"],
            "--runs here: no metrics.jsonl in it; give the --output_dir of a run",
        ),
        (["--measured", "--rounds", "0"], "--rounds 0: take at least 1"),
        (["--gpus", "--plot", "a.png"], "--plot a.png: nothing is simulated; --gpus 8"),
    ],
)
def test_mistakes_are_named_before_anything_runs(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_async.py", *flags])
    with pytest.raises(SystemExit) as ended:
        bench_async.main()
    assert (
        ended.value.code == 2
        and capsys.readouterr().err.splitlines()[-1] == f"bench_async.py: error: {message}"
    )


def test_without_a_simulation_the_four_keys_are_there(monkeypatch, capsys, tmp_path):
    runs = [str(reported(tmp_path / name, addition=0.9)) for name in ("sync", "async")]
    monkeypatch.setattr(sys, "argv", ["bench_async.py", "--gpus", "--json", "--recovery", *runs])
    assert bench_async.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    four = (
        "speedup_simulated_8gpu",
        "trainer_idle_simulated",
        "speedup_measured",
        "trainer_idle_measured",
    )
    assert [result[key] for key in four] == [None] * 4 and result["recovery"][0]["async"] == 0.9


def test_measured_figures_stand_in_the_result(monkeypatch, capsys):
    runs = {side: [made_of(RATES, side)] for side in async_runs.SIDES}
    monkeypatch.setattr(async_runs, "run_all", lambda setting, rounds: runs)
    monkeypatch.setattr(bench_async.async_runs, "Setting", lambda: SETTING)
    for flags in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["bench_async.py", "--gpus", "--measured", *flags])
        assert bench_async.main() == 0
    result = json.loads(
        next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    )
    assert (
        result["speedup_measured"] > 1
        and result["trainer_idle_measured"] >= 0
        and result["cores"] >= 1
    )
