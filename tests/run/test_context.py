"""What a run says of its teachers before they are built."""

import pytest

import train_gkd
from opd.inputs.arguments import parse
from opd.plan import apply
from opd.plan.job import Machine
from opd.run.prepare import prepare
from tests.support.processes import ROOT


@pytest.mark.usefixtures("device")
def test_a_teacher_without_room_to_write_is_a_line(tiny, tmp_path, monkeypatch):
    """Its weights and the KV cache of one sequence are more than the device has."""
    flags = [
        *("--student_model", str(tiny.student), "--teacher", str(tiny.addition)),
        *("--data", str(tiny.train), "--ds_config", str(ROOT / "ds_configs/zero3.json")),
        *("--max_prompt_tokens", "16", "--max_response_tokens", "8", "--output_dir"),
    ]
    config = parse(train_gkd.Config, [*flags, str(tmp_path / "a"), "--seq_kd", "--lmbda", "0.5"])
    run = prepare(config)
    assert run.why_silent(run.cfg.teachers[0]) is None
    train_gkd.check_teacher_writes(run)
    small = Machine(1, 1 << 20, 0, 25e9, is_gpu=False)
    monkeypatch.setattr(apply, "machine_here", lambda world_size: small)
    words = [str(tmp_path / "b"), "--seq_kd", "--lmbda", "0.5", "--ignore_plan"]
    run = prepare(parse(train_gkd.Config, [*flags, *words]))
    with pytest.raises(ValueError, match="--seq_kd: teacher default cannot write: it does not fit"):
        train_gkd.check_teacher_writes(run)
