"""What makes a run another run: fingerprints that old checkpoints hold, and directories of other
runs.
"""

import dataclasses
import json
import os

import pytest
import yaml

import train_gkd
import train_mopd
from opd.inputs.arguments import parse
from opd.inputs.identity import check_output_dir, fingerprint_of
from opd.options import to_dict

REQUIRED = ["--student_model", "s", "--data", "d", "--output_dir", "o"]


def make_config(*argv: str, script=train_mopd, teacher: str = "math=m"):
    return parse(script.Config, [*REQUIRED, "--teacher", teacher, *argv])


def error(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message, message
    return message


# ---- Fingerprints --------------------------------------------------------------------------------

# What checkpoints held before the fields of the configuration said themselves what belongs there.
RECORDED = {
    "student": "content of s",
    "teachers": {"math": {"content": "its hash", "domains": ["math"], "weight": 1.0}},
    "data": "hash of the data",
    "loss": {
        "loss": "reverse_kl", "support": "auto", "support_k": 64, "tail": "bucket",
        "estimator": "auto", "jsd_beta": 0.5, "skew_alpha": 0.1, "loss_temperature": 1.0,
        "advantage_clip": None, "clip_low": None, "clip_high": None, "dual_clip": None,
        "old_logprobs": "rollout", "is_mode": "none", "is_level": "token", "is_low": 0.5,
        "is_high": 5.0, "reject_level": "none", "reject_low": 0.5, "reject_high": 2.0,
        "reward_weight": 0.0, "reward_fn": ["exact_match"],
    },
    "algorithm": {},
    "optim": {
        "learning_rate": 1e-06, "lr_schedule": "cosine", "warmup_steps": 0, "min_lr_ratio": 0.1,
        "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-08,
        "max_grad_norm": 1.0,
    },
    "rollout": {
        "prompts_per_step": 64, "num_generations": 1, "max_response_tokens": 1024,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "teacher_cache_bytes": 17179869184,
    },
    "domain_weights": [], "num_steps": 100, "inner_updates": 1, "seed": 0,
}  # fmt: skip
STALE = {"max_staleness": 2, "sync_every": 1, "partial_rollout": True}
GKD = {"lmbda": 0.5, "seq_kd": False, "seq_kd_temperature": 1.0, "sft_alpha": 0.0}


@pytest.mark.parametrize(
    ("script", "flags", "changes"),
    [
        (train_mopd, "", {}),
        (train_mopd, "--mode async --max_staleness 2", {"algorithm": STALE}),
        (train_mopd, "--mode async --max_staleness 0 --rollout_replicas 2", {}),
        (train_gkd, "", {"algorithm": GKD}),
        (
            train_gkd,
            "--sft_alpha 1 --domain_weights a=1 b=2 --num_steps 7 --inner_updates 2 --seed 3",
            {
                "algorithm": {**GKD, "sft_alpha": 1.0},
                "domain_weights": ["a=1", "b=2"],
                "num_steps": 7,
                "inner_updates": 2,
                "seed": 3,
            },
        ),
        (
            train_mopd,
            "--teacher_cache_bytes 7",
            {"rollout": {**RECORDED["rollout"], "teacher_cache_bytes": 7}},
        ),
        (
            train_mopd,
            "--reward_fn last_number",
            {"loss": {**RECORDED["loss"], "reward_fn": ["last_number"]}},
        ),
        (
            train_mopd,
            "--rollout_kv_cache_gib 2 --teacher_kv_cache_gib 2 --rollout_tensor_parallel_size 2 "
            "--enforce_eager --loss_chunk_bytes 8 --overlap_k 0 --parity_every 0 --packing "
            "--micro_batch_size 1 --teacher_residency gpu --teacher_backend hf --eval_every 3",
            {},
        ),
    ],
)
def test_the_fingerprint_is_the_one_that_old_checkpoints_hold(monkeypatch, script, flags, changes):
    monkeypatch.setattr("opd.inputs.identity.content_hash", lambda path: f"content of {path}")
    old_default = ("--learning_rate", "1e-6")
    cfg = make_config(*old_default, *flags.split(), script=script)
    found = fingerprint_of(cfg, {"math": "its hash"}, "hash of the data")
    assert json.loads(json.dumps(found)) == {**RECORDED, **changes}


# ---- Run directories -----------------------------------------------------------------------------


def test_output_dir(tmp_path):
    config = make_config()
    run = tmp_path / "a" / "run"
    check_output_dir(run, "never", config)
    assert not run.exists()  # a check leaves nothing behind
    run.mkdir(parents=True)
    check_output_dir(run, "never", config)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert "--resume auto" in error(check_output_dir, run, "never", config)
    check_output_dir(run, "auto", config)
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=999))
    check_output_dir(run, "auto", longer)
    for flags in (
        ("--teacher_backend", "hf"),
        ("--teacher_residency", "disk"),
    ):  # what runs it, not what it says
        check_output_dir(run, "auto", make_config(*flags))
    old = to_dict(config)
    del old["teachers"][0]["backend"]  # of a run that knew one backend only
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    check_output_dir(run, "auto", config)
    moved = dataclasses.replace(
        config.teachers[0], backend="server", urls=("http://h:1",), api_key_env="KEY"
    )
    check_output_dir(run, "auto", dataclasses.replace(config, teachers=(moved,)))
    heavier = dataclasses.replace(
        config, teachers=(dataclasses.replace(config.teachers[0], weight=2.0),)
    )
    assert "holds another run (teachers differ)" in error(check_output_dir, run, "auto", heavier)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    assert "holds another run (seed differ)" in error(check_output_dir, run, "auto", other)
    (run / "config.yaml").write_text("- a")
    assert "its config.yaml is not a run's" in error(check_output_dir, run, "auto", config)


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "run"):
        assert "is a file" in error(check_output_dir, path, "auto", make_config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_dir_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "no permission" in error(check_output_dir, tmp_path / "run", "auto", make_config())
