"""What a resumed run may change, from the command line to `changes.jsonl`, and what it may not."""

import json

import pytest
import yaml

import train_mopd
from opd.inputs.arguments import parse
from opd.records import checkpoint
from opd.records.changes import CHANGES_FILE
from opd.run.prepare import prepare
from opd.types import LoopState
from tests.inputs.test_bad_input import arguments, mistake

pytestmark = pytest.mark.usefixtures("device")


def save(run, step: int) -> None:
    """A checkpoint of the run, as its loop would write it."""
    checkpoint.save(
        run.run_dir,
        LoopState(step=step),
        lambda path: (path / "shard").write_bytes(b"s"),
        run.fingerprint,
        keep=9,
    )


@pytest.fixture
def launch(tiny, tmp_path, capsys):
    """A prepared run, or the line that refuses it."""
    argv = [*arguments(tiny, tmp_path / "run"), "--num_steps", "4"]

    def start(*flags: str):
        return prepare(parse(train_mopd.Config, [*argv, *flags]))

    start.refused = lambda *flags: mistake(capsys, [*argv, *flags])
    start.dir = tmp_path / "run"
    return start


def changes_of(run_dir) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / CHANGES_FILE).read_text().splitlines()]
    assert all(row["time"] for row in rows)
    return [(row["step"], row["name"], row["old"], row["new"]) for row in rows]


def test_a_wanted_change_is_kept_and_the_next_checkpoint_has_it(launch, capsys):
    save(launch(), 2)
    longer = ("--num_steps", "9", "--max_response_tokens", "4")
    line = launch.refused(*longer)
    assert "`rollout.max_response_tokens` differs from the checkpoint: 8 there, 4 now" in line
    assert "--allow_change max_response_tokens,num_steps,eval" in line
    assert not (launch.dir / CHANGES_FILE).exists()

    run = launch(*longer, "--allow-change", "num_steps,max_response_tokens", "learning_rate")
    console = capsys.readouterr().out
    assert "changes from here on: num_steps 4 -> 9" in console
    assert {change.name for change in run.changes} == {
        "num_steps",
        "rollout.max_response_tokens",
        "eval",
    }
    kept = changes_of(launch.dir)
    assert (2, "num_steps", 4, 9) in kept and (2, "rollout.max_response_tokens", 8, 4) in kept
    written = yaml.safe_load((launch.dir / "config.yaml").read_text())
    assert written["num_steps"] == 9 and written["allow_change"] == []

    save(run, 5)  # the new values are the run's own now
    assert launch(*longer).changes == [] and changes_of(launch.dir) == kept
    assert "`num_steps` differs from the checkpoint: 9 there, 4 now" in launch.refused(
        "--max_response_tokens", "4"
    )


def test_a_change_that_never_came_to_pass_is_forgotten(launch):
    save(launch(), 2)
    new = ("--learning_rate", "5", "--allow_change", "learning_rate")
    assert len(launch(*new).changes) == 1 and len(changes_of(launch.dir)) == 1
    assert len(launch(*new).changes) == 1 and len(changes_of(launch.dir)) == 1  # not twice
    assert launch().changes == [] and changes_of(launch.dir) == []  # killed before it saved


def test_teachers_may_be_weighed_anew(launch, tiny):
    entries = [
        {"name": name, "model": str(tiny.addition), "domains": [*tiny.domains], "weight": 1}
        for name in ("first", "second")
    ]
    files = []
    for weight in (1, 3):
        entries[1]["weight"] = weight
        files.append(launch.dir.parent / f"{weight}.yaml")
        files[-1].write_text(yaml.safe_dump({"teachers": entries}))

    def parsed(file, *flags):
        argv = ["--config", str(file), "--student_model", str(tiny.student), *flags]
        options = ("--data", str(tiny.train), "--output_dir", str(launch.dir))
        small = ("--max_prompt_tokens", "16", "--max_response_tokens", "8")
        return parse(train_mopd.Config, [*argv, *options, *small])

    save(prepare(parsed(files[0])), 1)
    with pytest.raises(ValueError, match=r"teachers.second.weight.*--allow_change weight"):
        prepare(parsed(files[1]))
    (change,) = prepare(parsed(files[1], "--allow_change", "weight")).changes
    assert (change.name, change.old, change.new) == ("teachers.second.weight", 1.0, 3.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seed 1", "`seed` differs from the checkpoint: 0 there, 1 now; restore it, or start"),
        ("--prompts_per_step 4", "`rollout.prompts_per_step` differs"),
        ("--seed 1 --allow_change seed", "--allow_change seed: a run keeps it to its end"),
        ("--allow_change data", "--allow_change data: a run keeps it to its end"),
        ("--allow_change learnin_rate", "no such flag; did you mean learning_rate?"),
        ("--allow_change save_every", "--allow_change save_every: it may change at any time"),
        ("--allow_change system_prompt", "--allow_change system_prompt: a run keeps it to its end"),
        ("--allow_change stop_token_ids", "stop_token_ids: a run keeps it to its end"),
        ("--allow_change eval_data", "--allow_change eval_data: held-out prompts are allowed by"),
        (
            "--max_prompt_tokens 5 --overlong_prompts truncate",
            "`data` (rows, and what columns, template and system prompt make",
        ),
        ("--num_steps 1 --allow_change num_steps", "--num_steps 1: "),
    ],
)
def test_what_may_not_change(launch, flags, said):
    save(launch(), 2)
    assert said in launch.refused(*flags.split())
