"""Whole asynchronous runs on real rollout servers: the synchronous run at staleness 0, the bound
above it, and kills.
"""

import json
import signal

import pytest

from opd.records import sample_ledger
from opd.servers.server_processes import serving
from tests.support.launch import (
    command,
    ledger_of,
    losses_of,
    metrics_of,
    parameter_hash,
    start,
    succeed,
)
from tests.support.metrics_page import documented_keys, undocumented
from tests.support.processes import ROOT

pytestmark = pytest.mark.e2e
STEPS = 5


@pytest.fixture
def servers(models, key, tmp_path):
    """Two rollout servers and a log-prob server that any run of the test may push to, in turn."""
    weights = tmp_path / "weights"
    weights.mkdir(mode=0o700)
    common = {"weights_dir": weights, "dtype": "float32", "start_seconds": 300.0}
    extra = ["--max_model_len", "24", "--enforce_eager"]
    with (
        serving(
            str(models.student),
            replicas=2,
            name="rollout",
            protocol="rollout",
            kv_cache_gib=0.05,
            extra=extra,
            **common,
        ) as replicas,
        serving(str(models.student), name="logprob", protocol="logprob", **common) as (logprob,),
    ):
        yield replicas, weights, logprob


def launch(models, run_dir, servers, *flags, **changes):
    replicas, weights, _ = servers
    urls = [replica.url for replica in replicas if replica.alive]
    return command(
        models,
        run_dir,
        "--num_steps",
        str(STEPS),
        "--mode",
        "async",
        "--weights_dir",
        str(weights),
        *flags,
        "--rollout_servers",
        *urls,
        **changes,
    )


def old_policy_of(servers) -> tuple[str, ...]:
    asked = ("--old_logprobs", "server", "--logprob_servers", servers[2].url)
    return (*asked, "--max_staleness", "0")


@pytest.fixture(scope="module")
def calm(models, tmp_path_factory):
    """The synchronous run."""
    run_dir = tmp_path_factory.mktemp("calm") / "sync"
    succeed(command(models, run_dir, "--num_steps", str(STEPS)))
    return run_dir


def test_async_runs(models, servers, calm, tmp_path):
    """One story for one pair of servers, which take half a minute to start."""
    # Staleness 0 is the synchronous run, bit for bit; killed in the middle of a step and resumed,
    # too.
    same = tmp_path / "staleness_0"
    arguments = launch(models, same, servers, "--max_staleness", "0", "--save_every", "2")
    killed = start(arguments, OPD_FAULT="train.after_step:kill@4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    output = succeed(launch(models, same, servers, "--max_staleness", "0", "--save_every", "2"))
    assert "resumes from" in output
    assert losses_of(same) == losses_of(calm)
    assert not sample_ledger.differences(ledger_of(calm), ledger_of(same))
    assert parameter_hash(same) == parameter_hash(calm)

    # The old policy of a log-prob server is that of the trainer, where nothing is stale.
    loss = (
        "--loss",
        "reverse_kl_pg",
        "--clip_low",
        "0.2",
        "--is_mode",
        "truncate",
        "--num_steps",
        "3",
    )
    recomputed, asked = tmp_path / "recompute", tmp_path / "server"
    succeed(command(models, recomputed, *loss, "--old_logprobs", "recompute"))
    server = old_policy_of(servers)
    succeed(launch(models, asked, servers, *loss, *server))
    assert losses_of(asked) == pytest.approx(losses_of(recomputed), abs=1e-4)
    for row in metrics_of(asked):
        assert row["mismatch/old_policy_gap"] < 1e-5 and row["staleness/old_policy_lag"] == 0
        assert row["mismatch/abs_max"] < 1e-4 and row["logprob/failures"] == 0
    # some of a step's in the row before
    assert sum(row["logprob/requests"] for row in metrics_of(asked)) == 3 * 8

    # Above it nothing is lost, nothing is trained on twice, and the bound holds, whatever is
    # killed.
    stale = tmp_path / "staleness_2"
    flags = ("--max_staleness", "2", "--save_every", "1", "--is_mode", "truncate")
    killed = start(launch(models, stale, servers, *flags), OPD_FAULT="ahead.landed:kill@30")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    servers[0][0].kill()  # and one of the servers for good
    succeed(launch(models, stale, servers, *flags))
    rows = ledger_of(stale)
    assert [row["id"] for row in rows] == [row["id"] for row in ledger_of(calm)]
    assert all(0 <= row["step"] - 1 - row["policy_version"] <= 2 for row in rows)
    assert any(row["step"] - 1 - row["policy_version"] > 0 for row in rows)
    trained = [row for row in metrics_of(stale) if row["step"] > 0]
    assert max(row["staleness/policy_lag_max"] for row in trained) <= 2
    assert all(0 <= row["perf/trainer_idle"] <= 1 for row in trained)
    emitted = {name for row in trained for name in row if name != "step"}
    assert not undocumented(emitted, documented_keys(ROOT / "docs" / "metrics.md"))
    assert {
        "rollout/waited_s",
        "rollout/ready",
        "rollout/in_flight",
        "rollout/push_pause_s",
    } <= emitted


@pytest.mark.long
def test_a_push_that_fails_and_old_policies_that_are_measured(models, servers, calm, tmp_path):
    # A push that fails comes after the update: the step is saved as done, and its samples are not
    # trained on again.
    failed = tmp_path / "push_fails"
    arguments = launch(models, failed, servers, "--max_staleness", "0")
    stopped = start(arguments, OPD_FAULT="push.paused:raise@5")
    assert stopped.returncode == 1 and "pushing weights of version 2 failed" in stopped.stderr, (
        stopped.stderr[-2000:]
    )
    assert [path.name for path in (failed / "checkpoints").iterdir()] == ["step_2"]
    assert [row["step"] for row in metrics_of(failed)] == [1, 2]
    succeed(arguments)
    assert losses_of(failed) == losses_of(calm) and parameter_hash(failed) == parameter_hash(calm)

    # Where nothing reads the old policy, it is measured, and the losses are those of a run without
    # it.
    server = old_policy_of(servers)
    measured = tmp_path / "measured"
    succeed(launch(models, measured, servers, *server))
    assert losses_of(measured) == losses_of(calm)
    for row in metrics_of(measured):
        assert 0 <= row["mismatch/abs_mean"] < 1e-4 and row["mismatch/old_policy_gap"] < 1e-5


def test_servers_that_the_trainer_starts_are_gone_with_it(models, tmp_path):
    run = tmp_path / "auto"
    output = succeed(
        command(
            models,
            run,
            "--num_steps",
            "2",
            "--mode",
            "async",
            "--rollout_replicas",
            "1",
            "--eval_data",
            str(models.eval),
        )
    )
    assert "rollout servers: http://127.0.0.1:" in output
    assert json.loads((run / "report.json").read_text())["steps"] == 2
