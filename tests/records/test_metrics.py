"""Metrics, logs and run files: real files, real libraries, two real ranks."""

import ast
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd.processes import free_port
from opd.records.metrics import GROUPS, Metrics, memory, step_line
from tests.support.metrics_page import documented_keys, undocumented
from tests.support.processes import ROOT

DEADLINE_S = 300


def make(run_dir: Path, domains=("math", "code")) -> Metrics:
    return Metrics(run_dir, num_steps=10, domains=domains)


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def rows_of(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")
    assert lines.pop() == "", "the file must end with a line break"
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def run_script(path: Path, code: str, *launcher: str, **kwargs) -> subprocess.CompletedProcess:
    path.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [sys.executable, *launcher, str(path)]
    return subprocess.run(
        command, env=env, text=True, timeout=DEADLINE_S, cwd=path.parent, **kwargs
    )


# ---- accumulators --------------------------------------------------------------------------------

TWO_RANKS = """
import json, math, torch
from pathlib import Path
from opd import distributed
from opd.records.files import write_rollouts, write_run_files
from opd.records.metrics import Metrics

with distributed.exit_together():
    distributed.init()
    rank = distributed.rank()
    write_run_files(Path("run"), {"num_steps": 3}, ["train.py"])
    metrics = Metrics(Path("run"), num_steps=3, domains=["math", "code"])
    if rank == 0:
        metrics.add("loss/total", 6.0, 2)
        metrics.add("loss/total/math", 6.0, 2)
    else:
        metrics.merge({"loss/total": (torch.tensor(2.0), torch.tensor(6)), "loss/total/code": (torch.tensor(2.0), 6.0)})
        metrics.add("mismatch/k1", 0.0, 0)
    metrics.add_max("mem/host_rss_gib", [3.0, 5.0][rank])
    metrics.add("time/score", [1.0, 2.0][rank])
    metrics.add("time/score", [1.5, 0.0][rank])
    metrics.histogram("distill/k1", torch.tensor([[0.0, 1.0], [2.0, math.nan]])[rank], step=1)
    row = metrics.flush(1)
    write_rollouts(Path("run"), 1, [{"rank": rank}])
    Path(f"row_{rank}.json").write_text(json.dumps(row))
    metrics.close()
"""  # noqa: E501


def test_means_are_over_the_items_of_all_ranks(tmp_path):
    """3 and 1/3 are the ranks' own means; 8 / 8 is the mean over items.

    Ranks hold different keys.
    """
    run_script(
        tmp_path / "two.py",
        TWO_RANKS,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        check=True,
        capture_output=True,
    )
    expected = {
        "loss/total": 1.0,
        "loss/total/code": 2 / 6,
        "loss/total/math": 3.0,
        "time/score": 2.5,
        "mem/host_rss_gib": 5.0,
    }
    for rank in (0, 1):
        assert json.loads((tmp_path / f"row_{rank}.json").read_text()) == expected
    assert rows_of(tmp_path / "run") == [{"step": 1, **expected}]
    assert (tmp_path / "run/rollouts/step_1.jsonl").read_text() == '{"rank": 0}\n'
    events = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    assert events.Histograms("distill/k1")[0].histogram_value.num == 3
    assert events.Scalars("loss/total")[0].value == 1.0


def test_the_split_into_micro_batches_does_not_matter(tmp_path):
    whole, split = make(tmp_path / "a"), make(tmp_path / "b")
    whole.add("loss/total", 12.0, 6)
    for total, count in ((1.0, 1), (5.0, 3), (6.0, 2)):
        split.merge({"loss/total": (torch.tensor(total), torch.tensor(count))})
    assert whole.flush(1) == split.flush(1) == {"loss/total": 2.0}


def test_tensors_of_any_dtype_are_summed_exactly(tmp_path):
    metrics = make(tmp_path)
    metrics.add(
        "distill/k1", torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(1, dtype=torch.int64)
    )
    metrics.add("distill/k1", torch.tensor(2.0**-30, dtype=torch.float64), torch.tensor(True))
    metrics.add("distill/k1", torch.tensor([1.0], requires_grad=True), 2)
    assert metrics.flush(1) == {"distill/k1": (1.5 + 2.0**-30) / 4}


def test_a_flush_empties_the_accumulators(tmp_path):
    metrics = make(tmp_path)
    metrics.add("loss/total", 1.0)
    metrics.add_max("mismatch/abs_max", 9.0)
    metrics.flush(1)
    metrics.add("loss/total", 3.0)
    assert metrics.flush(2) == {"loss/total": 3.0}


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    metrics = make(tmp_path)
    metrics.add("loss/total", math.nan)
    metrics.add("optim/grad_norm", math.inf)
    for value in (math.nan, 1.0):
        metrics.add_max("mismatch/abs_max", value)
    row = metrics.flush(1)
    assert (
        math.isnan(row["loss/total"])
        and math.isnan(row["mismatch/abs_max"])
        and math.isinf(row["optim/grad_norm"])
    )
    assert rows_of(tmp_path) == [
        {"step": 1, "loss/total": None, "mismatch/abs_max": None, "optim/grad_norm": None}
    ]


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan]])
def test_a_maximum_keeps_nan_at_any_position(tmp_path, values):
    metrics = make(tmp_path)
    for value in values:
        metrics.add_max("mismatch/abs_max", value)
    assert math.isnan(metrics.flush(1)["mismatch/abs_max"])


def test_a_key_without_items_is_left_out(tmp_path):
    metrics = make(tmp_path)
    metrics.add("loss/total/math", torch.tensor(0.0), torch.tensor(0))
    assert metrics.flush(1) == {}
    assert rows_of(tmp_path) == [{"step": 1}]


def test_timed_adds_up_over_a_step(tmp_path):
    metrics = make(tmp_path)
    start = time.perf_counter()
    for _ in range(2):
        with metrics.timed("train"):
            entered = time.perf_counter()
            while time.perf_counter() < entered + 0.01:
                pass
    elapsed = time.perf_counter() - start
    assert 0.02 <= metrics.flush(1)["time/train"] <= elapsed


@pytest.mark.parametrize(
    "key", ["loss", "losses/total", "loss/", "loss/total/", "loss/total/biology"]
)
def test_a_key_that_is_no_key_is_refused(tmp_path, key):
    with pytest.raises(AssertionError, match="metric"):
        make(tmp_path).add(key, 1.0)


def test_domains_may_hold_slashes_and_evaluation_may_have_its_own(tmp_path):
    metrics = make(tmp_path, domains=["org/set"])
    metrics.add("loss/total/org/set", 1.0)
    metrics.add("eval/accuracy/held/out", 0.5)
    assert metrics.flush(1) == {"loss/total/org/set": 1.0, "eval/accuracy/held/out": 0.5}


# ---- resume --------------------------------------------------------------------------------------


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    first = make(tmp_path)
    for step in range(5):
        first.add("loss/total", float(step))
        first.flush(step)
    first.close()
    # TensorBoard orders files by the second in their names
    for path in (tmp_path / "tb").iterdir():
        path.rename(re.sub(r"tfevents\.\d+", "tfevents.1000000000", str(path)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/to')  # a crash in the middle of a line

    second = make(tmp_path)
    second.truncate(2)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]
    with pytest.raises(AssertionError, match="step 2"):
        second.flush(2)
    for step in (3, 4):
        second.add("loss/total", 10.0 + step)
        second.flush(step)
    second.close()

    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    assert [(row["step"], row["loss/total"]) for row in rows_of(tmp_path)] == expected
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_truncate_to_minus_one_forgets_everything(tmp_path):
    metrics = make(tmp_path)
    metrics.flush(0)
    again = make(tmp_path)
    again.truncate(-1)
    assert rows_of(tmp_path) == []
    again.flush(0)
    assert [row["step"] for row in rows_of(tmp_path)] == [0]


# ---- console -------------------------------------------------------------------------------------


def test_the_line_of_a_step():
    row = {
        "loss/total": 0.123456,
        "perf/tokens_per_second": 5321.4,
        "time/rollout": 1.0,
        "time/train": 0.5,
        "time/step": 2.0,
        "eval/accuracy/math": 0.25,
    }
    assert step_line(3, 10, row, 3671.2) == (
        "step 3/10  loss 0.1235  5,321 tok/s  eta 1:01:11  2.00s (rollout 1.00, train 0.50)  "
        "accuracy math 0.250"
    )
    assert step_line(0, 10, {}, None) == "step 0/10"


def test_the_time_left_is_that_of_recent_steps(tmp_path, capsys):
    metrics = make(tmp_path)
    metrics.add("time/step", 6.0)
    metrics.flush(1)
    metrics.add("time/step", 4.0)
    metrics.flush(2)
    assert (
        capsys.readouterr().out == "step 1/10  eta 0:00:54  6.00s\nstep 2/10  eta 0:00:40  4.00s\n"
    )


TERMINAL = """
from pathlib import Path
from opd.log import say
from opd.records.metrics import Metrics
metrics = Metrics(Path("run"), num_steps=3, domains=[])
for step in (1, 2, 3):
    metrics.flush(step)
say("done [bold]")
metrics.close()
"""


def test_a_terminal_gets_a_bar_below_its_lines(tmp_path):
    controller, terminal = pty.openpty()
    try:
        env = {"TERM": "xterm", "COLUMNS": "80"}
        run_script(
            tmp_path / "bar.py",
            TERMINAL,
            check=True,
            stdout=terminal,
            stderr=subprocess.PIPE,
            env=env,
        )
        shown = os.read(controller, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(controller)
    for text in ("step 1/3", "step 3/3", "━", "done [bold]", "\x1b[?25h"):
        assert text in shown, f"{text!r} is missing from {shown!r}"


def test_memory_is_in_gib():
    before = memory()["mem/host_rss_gib"]
    block = torch.ones(2**28)  # 1 GiB of float32
    assert memory()["mem/host_rss_gib"] - before == pytest.approx(block.nbytes / 2**30, abs=0.1)


# ---- documentation -------------------------------------------------------------------------------


def test_every_documented_key_has_a_formula_and_a_meaning():
    patterns = documented_keys(ROOT / "docs/metrics.md")
    assert {key.split("/")[0] for key in patterns} == set(GROUPS)
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4 and all(cells), line


def test_every_key_in_the_code_is_documented():
    """A key in a string of the source; what a run emits is compared where a run is made."""
    patterns = documented_keys(ROOT / "docs/metrics.md")
    shape = re.compile(rf"({'|'.join(GROUPS)})/[a-z0-9_]*[a-z0-9]")
    keys = set(memory())
    for path in (*ROOT.glob("opd/**/*.py"), *ROOT.glob("train_*.py")):
        strings = (
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        )
        keys |= {value for value in strings if isinstance(value, str) and shape.fullmatch(value)}
    # A key that exists per domain only is built from its prefix.
    assert not undocumented(keys, patterns) - {key.removesuffix("/domain") for key in patterns}


def test_the_pattern_of_a_documented_key():
    patterns = documented_keys(ROOT / "docs/metrics.md")
    good = {
        "loss/total",
        "loss/total/math",
        "loss/total/org/set",
        "eval/accuracy/math",
        "optim/grad_norm",
    }
    bad = {"loss/totals", "eval/accuracy", "optim/grad_norm/math", "loss/other"}
    assert undocumented(good | bad, patterns) == bad
