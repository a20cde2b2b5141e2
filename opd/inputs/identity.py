"""What makes a run another run: the fingerprint that its checkpoints hold, and what a run directory
says of the run in it.

Both follow from what the fields of the configuration say of themselves (`config.option`).
"""

import os
from pathlib import Path
from typing import Any

import yaml

from opd.config import is_async
from opd.inputs.arguments import nearest, teachers_from_yaml
from opd.inputs.content import content_hash
from opd.inputs.teacher_prompts import own_prompts
from opd.options import options_of, to_dict

# Group -> the part of the fingerprint that its fields stand in, unless they say otherwise. Fields
# of other groups stand in none, unless they name one.
PARTS = {"loss": "loss", "optim": "optim", "rollout": "rollout", "gkd": "algorithm"}


def fingerprint_of(cfg, hashes: dict[str, str], data_hash: str) -> dict[str, Any]:
    """What must not change under a resumed run, by content: a renamed directory is the same model.

    `hashes` are those of the teachers, by name. Where no token may be stale an asynchronous run is
    the synchronous one.
    """
    own = own_prompts(cfg)
    found = {
        "student": content_hash(cfg.model.student_model),  # its tokenizer included
        "teachers": {
            t.name: {"content": hashes[t.name], "domains": t.domains, "weight": t.share}
            | (own[t.name].identity if t.name in own else {})
            for t in cfg.teachers
        },
        "data": data_hash,
        "algorithm": {},
    }
    is_stale = is_async(cfg) and cfg.ahead.max_staleness > 0
    for group, field, value in options_of(cfg):
        part = field.metadata.get("fingerprinted", PARTS.get(group, False))
        applies = {"ahead": is_stale, "lora": cfg.lora.lora_r > 0}.get(group, True)
        if part and applies:
            (found if part is True else found.setdefault(part, {}))[field.name] = value
    return found


# Which prompts a step has follows from these, for every step of a run.
FIXED = ("seed", "prompts_per_step")
# Names of the fingerprint that are no flags, and may change.
BESIDE_FLAGS = ("eval", "weight")


def changeable(config) -> dict[str, bool]:
    """What `--allow_change` knows: name -> whether it may change under a resumed run."""
    found = {
        field.name: field.name not in FIXED
        for group, field, _ in options_of(config)
        if field.metadata.get("fingerprinted", PARTS.get(group, False))
    }
    found |= {name: False for name in found if name.startswith("lora_")}  # shapes of what is saved
    # models are compared by content, and data with all that makes prompts of them
    of_data = [
        f.name for group, f, _ in options_of(config) if group == "data" and f.name not in found
    ]
    own = ("teacher_prompt", "teacher_chat_template_kwargs")
    never = ("student_model", "teacher", "teachers", *own, "stop_token_ids", *of_data)
    never = {name: False for name in never if name != "eval_data"}
    return found | never | dict.fromkeys(BESIDE_FLAGS, True)


def allowed_changes(config) -> set[str]:
    """The names of `--allow_change`; ValueError for one that does not exist or may never change."""
    known = changeable(config)
    names = {n.strip() for value in config.run.allow_change for n in value.split(",")} - {""}
    for name in sorted(names):
        if name == "eval_data":
            raise ValueError("--allow_change eval_data: held-out prompts are allowed by eval")
        if name not in known:
            others = {field.name for _, field, _ in options_of(config)}
            why = (
                "it may change at any time; leave it out"
                if name in others
                else f"no such flag{nearest(name, [*known])}"
            )
            raise ValueError(f"--allow_change {name}: {why}")
        if not known[name]:
            raise ValueError(
                f"--allow_change {name}: a run keeps it to its end; start anew in another "
                "--output_dir"
            )
    return names


def flag_of(name: str, config) -> str | None:
    """The name under which `--allow_change` knows a value of the fingerprint; None where it must
    not change. `teachers.math.weight` is `weight`.
    """
    part, _, last = name.rpartition(".")
    if part.startswith("teachers.") and last != "weight":
        return None
    return last if changeable(config).get(last, False) else None


def check_output_dir(run_dir: str | Path, resume: str, config) -> None:
    """Refuses a run directory that cannot be written or that holds another run.

    With `resume` other than "never" a directory with a run is that run's continuation, unless
    `config` differs from its `config.yaml` in what makes a run the same run.
    """
    run_dir = Path(run_dir)
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ValueError(
            f"--output_dir {run_dir}: {existing} is a file, not a directory; choose another"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"--output_dir {run_dir}: no permission to write in {existing}; choose another"
        )
    recorded = run_dir / "config.yaml"
    if not recorded.exists():
        return
    if resume == "never":
        raise ValueError(
            f"--output_dir {run_dir}: holds another run; choose another directory, or continue it "
            "with --resume auto"
        )
    if changed := _changed(recorded, config):
        raise ValueError(
            f"--output_dir {run_dir}: holds another run ({', '.join(changed)} differ); choose "
            "another directory"
        )


def _changed(recorded: Path, config) -> list[str]:
    """Names of what differs between the run that wrote this file and that of `config`."""
    try:
        old = yaml.safe_load(recorded.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):
        raise ValueError(
            f"--output_dir {recorded.parent}: its config.yaml is not a run's; choose another "
            "directory"
        )
    now = to_dict(config)
    names = [field.name for _, field, _ in options_of(config) if field.metadata.get("identifies")]
    changed = [name for name in names if old.get(name) != now[name]]
    teachers = teachers_from_yaml(old.get("teachers"), str(recorded))
    if [spec.identity for spec in teachers] != [spec.identity for spec in config.teachers]:
        changed.append("teachers")
    return changed
