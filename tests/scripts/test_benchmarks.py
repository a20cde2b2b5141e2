"""Each benchmark on sizes of seconds: times here say nothing, errors and shapes do."""

import argparse
import functools
import json
import subprocess
import sys

import pytest
import torch

from scripts import bench_adapters, bench_colocation, bench_loss, bench_scaling, bench_scoring
from scripts.measure import tools
from scripts.measure.forked import run_forked
from tests.support.processes import ROOT, worker_environment

TRL_DIR = ROOT / ".trl"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# ---- The scripts ---------------------------------------------------------------------------------


def test_bench_loss_measures_ours_against_naive_without_trl(run_main, tmp_path):
    result, console = run_main(
        bench_loss,
        f"--vocab 8192 --hidden 32 --tokens 512 --chunk_bytes {2**20} --repeats 1 --kinds "
        f"forward_kl --trl_dir {tmp_path} --device cpu",
    )
    assert f"pip install --no-deps --target {tmp_path} trl==" in console
    (case,) = result["cases"]
    assert (case["kind"], case["V"], case["H"], case["N"]) == ("forward_kl", 8192, 32, 512)
    assert case["time_vs_trl"] is case["trl_ms"] is case["trl_mib"] is None
    assert 0 < case["error"] < 1e-3
    assert case["time_vs_naive"] == pytest.approx(case["ours_ms"] / case["naive_ms"], rel=0.01)
    assert case["naive_mib"] > 4 * 512 * 8192 * 4 / tools.MIB, (
        "logits and log-softmax of both models, at the least"
    )
    assert 0 < case["memory_vs_naive"] < 0.5
    assert case["share_of_matmul_ceiling"] > 0
    assert result["torch"] == torch.__version__


@pytest.mark.skipif(
    not TRL_DIR.exists(),
    reason=f"pip install --no-deps --target .trl trl=={bench_loss.TRL_VERSION}",
)
def test_bench_loss_measures_trl(run_main):
    result, _ = run_main(
        bench_loss,
        "--vocab 512 --hidden 32 --tokens 16 --repeats 1 --device cpu --kinds jsd --jsd_beta 0.3 "
        f"--trl_dir {TRL_DIR}",
    )
    (case,) = result["cases"]
    assert case["error"] < 1e-3
    assert case["time_vs_trl"] == pytest.approx(case["ours_ms"] / case["trl_ms"], rel=0.01)


@pytest.mark.parametrize("served", [False, pytest.param(True, marks=pytest.mark.long)])
def test_bench_scoring(tmp_path, served):
    sizes = "--vocab 512 --hidden 64 --layers 1 --sequences 2 --length 24 --support_k 8"
    arguments = f"--json {sizes} --repeats 1 --kv_cache_gib 0.05 {'--served' * served}".split()
    out, err = tmp_path / "out", tmp_path / "err"
    script = str(ROOT / "scripts" / "bench_scoring.py")
    status = run_forked([script, *arguments], out, err, 300, worker_environment())
    assert status == 0, err.read_text()[-3000:]
    result = json.loads(out.read_text().splitlines()[-1])
    ours_ms = result["prefill_ms"] + result["score_ms"]
    assert result["speedup_vs_prompt_logprobs"] == pytest.approx(
        result["prompt_logprobs_ms"] / ours_ms, rel=0.01
    )
    assert result["ratio_to_floor"] == pytest.approx(
        ours_ms / (result["prefill_ms"] + result["matmul_ms"]), rel=0.01
    )
    assert result["largest_difference"] <= 1e-3
    parts = [
        "prompt_logprobs",
        "prefill",
        "score",
        "matmul",
        *(bench_scoring.SERVED if served else []),
    ]
    assert min(result[f"{part}_ms"] for part in parts) > 0
    if served:
        # 23 of 24 tokens are scored: 8 bytes a candidate and 3 numbers, or 64 hidden numbers, in
        # float32, and headers
        assert 76 * 23 / 24 < result["served_binary_bytes_per_token"] < 76 + 40
        assert 256 * 23 / 24 < result["served_hidden_bytes_per_token"] < 256 + 20
        assert result["served_json_over_binary_bytes"] > 5


@pytest.mark.long
def test_bench_adapters_compares_three_sides(tmp_path):
    sizes = "--backends hf --hidden 64 --layers 1 --teachers 2 --sequences 2 --length 24"
    out, err = tmp_path / "out", tmp_path / "err"
    script = str(ROOT / "scripts" / "bench_adapters.py")
    arguments = [script, *f"--json {sizes} --repeats 1".split()]
    status = run_forked(arguments, out, err, 300, worker_environment())
    assert status == 0, err.read_text()[-3000:]
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["hf_largest_difference"] <= 1e-3
    assert min(result[f"hf_{side}_ms"] for side in bench_adapters.SIDES) > 0
    assert result["hf_adapters_over_base_time"] == pytest.approx(
        result["hf_adapters_ms"] / result["hf_one_base_ms"], rel=0.1
    )
    assert result["hf_engines_mb"] > result["hf_one_base_mb"]


def test_bench_push_compares_a_push_with_a_copy(tmp_path):
    out, err = tmp_path / "out", tmp_path / "err"
    script = str(ROOT / "scripts" / "bench_push.py")
    arguments = [script, *f"--json --gib 0.04 --repeats 1 --root {tmp_path}".split()]
    status = run_forked(arguments, out, err, 300, worker_environment())
    assert status == 0, err.read_text()[-3000:]
    result = json.loads(out.read_text().splitlines()[-1])
    push_ms = sum(result[f"{side}_ms"] for side in ("publish", "verify", "load"))
    assert result["push_over_copy"] == pytest.approx(push_ms / result["copy_ms"], rel=0.05)
    assert 40 <= result["mib"] <= 60
    assert not list(tmp_path.glob("bench_push_*")), "it leaves no weights behind"


def test_bench_scaling_plots(run_main, tmp_path):
    plot = tmp_path / "new" / "scaling.png"
    result, _ = run_main(
        bench_scaling,
        "--hidden 32 --vocab 1024 --tokens 64 1024 --vocabularies 512 8192 --supports 1 16 "
        f"--teachers 1 4 --repeats 1 --plot {plot} --device cpu",
    )
    assert min(result[key] for key in ("slope_tokens", "slope_vocabulary", "teachers_4_vs_1")) > 0
    assert isinstance(result["slope_support"], float)
    assert {panel: [point["x"] for point in row] for panel, row in result["points"].items()} == {
        "tokens": [64, 1024],
        "vocabulary": [512, 8192],
        "support": [1, 16],
        "teachers": [1, 4],
    }
    content = plot.read_bytes()
    assert content.startswith(PNG_SIGNATURE) and len(content) > 10_000


def test_scaling_refuses_a_slope_through_one_point(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--tokens", "64", "64"])
    with pytest.raises(SystemExit):
        bench_scaling.main()
    assert "--tokens [64, 64]: a slope needs two different values" in capsys.readouterr().err


# ---- A benchmark must not compare different things -----------------------------------------------


def case_of(kind: str, **changes) -> bench_loss.Case:
    values = {
        "vocab": 300,
        "hidden": 24,
        "tokens": 7,
        "jsd_beta": 0.3,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return bench_loss.Case(kind=kind, **{**values, "chunk_bytes": None, **changes})


@pytest.mark.parametrize("kind", bench_loss.KINDS)
def test_float64_reference_is_autograd_of_the_written_down_form(kind):
    case = case_of(kind, vocab=10_000)  # more than one slice of the vocabulary
    inputs = bench_loss.make_inputs(case)
    loss, grad_NH = bench_loss.float64_reference(inputs, case)
    wide = bench_loss.Inputs(
        *[
            tensor.detach().double().requires_grad_(tensor.requires_grad)
            for tensor in (
                inputs.hidden_NH,
                inputs.weight_VH,
                inputs.teacher_hidden_NG,
                inputs.teacher_weight_VG,
            )
        ]
    )
    expected_loss, expected_NH = bench_loss.loss_and_gradients(bench_loss.naive_loss, wide, case)
    torch.testing.assert_close(
        (loss, grad_NH), (expected_loss, expected_NH), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", bench_loss.KINDS)
def test_a_side_that_computes_something_else_ends_the_benchmark(kind, monkeypatch):
    case = case_of(kind)
    inputs = bench_loss.make_inputs(case)
    reference = bench_loss.float64_reference(inputs, case)
    assert (
        max(bench_loss.check_agreement(["naive", "ours"], inputs, case, reference).values()) < 1e-4
    )
    monkeypatch.setitem(
        bench_loss.LOSSES, "other", lambda inputs, case: 1.01 * bench_loss.naive_loss(inputs, case)
    )
    with pytest.raises(SystemExit, match="other disagrees with float64"):
        bench_loss.check_agreement(["naive", "other"], inputs, case, reference)


def test_scoring_ends_if_the_routes_disagree():
    def position(*logprobs: float) -> dict:
        return {token: argparse.Namespace(logprob=value) for token, value in enumerate(logprobs)}

    # the token itself comes on top of the k candidates, and the first position has nothing
    outputs = [
        argparse.Namespace(
            prompt_logprobs=[None, position(-3.0, -0.5, -1.0), position(-0.25, -2.0)]
        )
    ]
    topk_NK = torch.tensor([[-0.5, -1.0], [-0.25, -2.0]])
    assert torch.equal(bench_scoring.topk_of(outputs, 2), topk_NK)
    same = argparse.Namespace(topk_logprobs_NK=topk_NK)
    assert bench_scoring.check_agreement(outputs, same, 2, "float32") == 0
    other = argparse.Namespace(topk_logprobs_NK=topk_NK + 0.01)
    with pytest.raises(SystemExit, match=r"differ by 0\.01"):
        bench_scoring.check_agreement(outputs, other, 2, "float32")


# ---- The tools -----------------------------------------------------------------------------------


def test_the_meter_sees_memory_that_is_gone_when_the_call_returns():
    run = functools.partial(torch.ones, 16 * tools.MIB)  # 64 MiB, nobody keeps the result
    assert tools.in_child(tools.peak_extra_bytes, run) / tools.MIB == pytest.approx(64, abs=8)


def test_a_child_without_enough_memory_is_none_and_other_errors_are_raised():
    assert tools.in_child(torch.ones, 10**13) is None
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tools.in_child(torch.mm, torch.ones(1, 2), torch.ones(1, 2))


def test_sides_take_turns_and_the_median_counts(monkeypatch):
    calls, now_s, durations_s = [], [0.0], iter([1.0, 0.001, 9.0, 0.001, 2.0, 0.001])
    monkeypatch.setattr(tools.time, "perf_counter", lambda: now_s[0])

    def side(name: str) -> int:
        calls.append(name)
        now_s[0] += next(durations_s)
        return len(calls)

    ms, results = tools.take_turns({"slow": lambda: side("slow"), "fast": lambda: side("fast")}, 3)
    assert calls == ["slow", "fast"] * 3
    assert ms == pytest.approx({"slow": 2000, "fast": 1})
    assert results == {"slow": 5, "fast": 6}


def test_slope_and_ratio():
    assert tools.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert tools.slope([1, 10, 100], [7, 7, 7]) == pytest.approx(0)
    assert tools.ratio(1.0, 3.0) == 0.3333
    assert tools.ratio(1.0, None) is None and tools.ratio(None, 1.0) is None


def test_a_row_below_the_meter_has_no_memory_ratio():
    ms = {"naive": 2.0, "ours": 1.0, "matmul": 0.5}
    row = bench_loss.row(
        case_of("jsd"), ms, {"naive": 0.2, "ours": 0.1}, {"naive": 1e-7, "ours": 1e-7}
    )
    assert (
        row["memory_vs_naive"] is None
        and row["time_vs_naive"] == 0.5
        and row["time_vs_trl"] is None
    )
    assert row["share_of_matmul_ceiling"] == 0.5
    row = bench_loss.row(case_of("jsd"), ms, {"naive": 20.0, "ours": 5.0}, {"ours": 1e-7})
    assert row["memory_vs_naive"] == 0.25


def test_fits_read_the_right_points():
    line = [{"x": x, "ms": 2.0 * x} for x in (1, 4)]
    flat = [{"x": x, "ms": 5.0} for x in (1, 4)]
    points = {"tokens": line, "vocabulary": line, "support": flat, "teachers": line}
    expected = {"slope_tokens": 1, "slope_vocabulary": 1, "slope_support": 0, "teachers_4_vs_1": 4}
    assert bench_scaling.fits(points) == pytest.approx(expected)


def test_a_table_aligns_and_shows_what_is_missing_as_a_dash():
    assert (
        tools.table([{"side": "ours", "ms": 1.5}, {"side": "trl", "ms": None}])
        == "side   ms\nours  1.5\n trl    -"
    )


# ---- Peak memory of a run ------------------------------------------------------------------------

HOLDS_64_MIB = "held = bytearray(b'x') * (64 << 20); print('held', flush=True); input()"


def test_the_peak_is_that_of_children_and_grandchildren_together(childless):
    """What they gave back, and what has ended, still counts; this process does not."""
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_64_MIB!r}])"
    for code, least in (
        (HOLDS_64_MIB, 64),
        (grandchild, 64),
        ("print('held', flush=True); input()", 0),
    ):
        with bench_colocation.peak_of_children() as peak:
            child = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert child.stdout.readline() == b"held\n"
            while peak.bytes < bench_colocation.resident_bytes(
                bench_colocation.descendants(child.pid) | {child.pid}
            ):
                assert child.poll() is None
            child.communicate(b"\n")
        assert least <= peak.bytes >> 20 < least + 64, code


def test_growth_is_over_the_weights_that_came():
    sizes = [400, 300, 200, 100, 50]
    peaks = {("disk", 1): 1000, ("disk", 2): 1010, ("disk", 4): 1060, ("host", 4): 1600}
    result = bench_colocation.summary(peaks, sizes)
    assert (
        result["flatness"] == 1.06 and result["growth_4"] == 0.1 and result["host_growth_4"] == 1.0
    )
    assert (result["peak_2"], result["peak_8"], result["host_4"]) == (1010, None, 1600)
    assert bench_colocation.planned(1166, 1060) == {"predicted_4": 1166, "planner_error": 0.1}
    assert bench_colocation.planned(None, 1060)["planner_error"] is None


@pytest.mark.long
@pytest.mark.e2e
def test_bench_colocation_on_tiny_models(childless, tmp_path):
    """One teacher of 1 MiB: what a run holds beside it.

    The rest of the benchmark is more of the same.
    """
    bench_colocation.write_models(tmp_path, [64], 1)
    command = ["train_mopd.py", *bench_colocation.flags_of(tmp_path, 1, "disk", 1)]
    peak = bench_colocation.peak_of(command, tmp_path / "log.txt", 1)
    assert 200 * tools.MIB < peak < 4000 * tools.MIB
    assert (tmp_path / "disk_1" / "model" / "model.safetensors").exists()
