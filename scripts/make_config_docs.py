"""Write docs/config.md from the configuration dataclasses of the two trainers.

`python scripts/make_config_docs.py` writes the page; with `--check` it only compares, and exits 1
if the page is stale. `EVERYDAY` names the flags of the first half.
"""

import argparse
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import train_gkd
import train_mopd
from opd.config import TeacherSpec
from opd.options import groups_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"

INTRODUCTION = """# Flags

Made by `python scripts/make_config_docs.py` from the configuration dataclasses; a test compares the
two. Do not edit.

Each row is a flag (`--num_steps 200`) and a key of the YAML file that `--config FILE` names
(`num_steps: 200`). The command line wins over the file. Lists take several values:
`--data a.jsonl b.jsonl`, or a YAML list. NAME=WEIGHT and DOMAIN=TEXT may also be a YAML mapping. A
switch is turned on by its bare name (`--dry_run`) or by `true`, and off by `false`. An unknown flag
or key is an error that offers the nearest name.

Contents: [Everyday flags](#everyday-flags) · [Teachers in YAML](#teachers-in-yaml) ·
[Expert flags](#expert-flags)
"""

EVERYDAY_TITLE = """
## Everyday flags

What most runs set. Everything else has a default that suits a first run.
"""

EXPERT_TITLE = """
## Expert flags

For a run that works, and is to be faster, larger or different.
"""

# In the order of the page. A name that no longer exists stops the script.
EVERYDAY = (
    "student_model", "teacher", "data", "eval_data", "output_dir", "dry_run",
    "loss", "support", "support_k", "reward_fn", "reward_weight", "lmbda", "seq_kd",
    "prompts_per_step", "num_generations", "max_prompt_tokens", "max_response_tokens",
    "temperature", "chat_template_kwargs", "system_prompt", "domain_weights", "micro_batch_size",
    "gradient_checkpointing", "learning_rate", "lora_r", "merge_on_export",
    "warmup_steps", "num_steps", "eval_every", "save_every", "resume", "seed",
    "teacher_backend", "teacher_residency", "rollout_kv_cache_gib", "ds_config", "plan",
    "mode", "max_staleness",
)  # fmt: skip

TITLES = {
    "model": "Model",
    "teacher": "Teachers",
    "privilege": "Prompts of teachers ([teacher_prompts.md](teacher_prompts.md))",
    "data": "Data",
    "rollout": "Prompts and responses",
    "ahead": "Asynchronous rollouts (`train_mopd.py` only)",
    "loss": "Loss",
    "gkd": "Generalized Knowledge Distillation (`train_gkd.py` only)",
    "batch": "Batch",
    "optim": "Optimizer",
    "lora": "LoRA",
    "run": "Run",
}

TEACHERS_NOTE = """
## Teachers in YAML

The YAML key `teachers` is a list with one entry per teacher. It takes the place of `--teacher`; a
`--teacher` on the command line replaces the whole list. The teachers of one domain are a mixture:
their weights are divided by their sum.

```yaml
teachers:
  - {name: math, model: models/math, domains: [gsm8k, algebra]}
  - {name: code, model: models/code, domains: [python], weight: 1}
  - {name: large_code, model: models/large_code, domains: [python], weight: 3}
  - {name: general, model: models/general, domains: "*"}
```

| key | default | meaning |
|---|---|---|
"""

TEACHER_KEYS = {
    "name": "Name of the teacher: unique, used in messages, logs and errors.",
    "model": "A Hugging Face model directory or hub id. With backend `server`: the model's name "
    "there, or a local directory of the same model; may be left out. `self@0`, `self@-K` and "
    "`self@ema:DECAY` are the student as it was, see "
    "[teachers.md](teachers.md#the-student-as-a-teacher).",
    "adapter": "A LoRA adapter on `model`, a directory or hub id; see "
    "[teachers.md](teachers.md#adapters-on-one-base).",
    "domains": 'List of the domains it takes, or `"*"`: every domain that no other teacher names. '
    "Default: its own name.",
    "weight": "Share in the domains that it shares with other teachers, relative to theirs; every "
    "one of them needs it. A teacher of weight 0 takes no part.",
    "backend": "`vllm`, `hf` or `server`, see [teachers.md](teachers.md). Default: "
    "`--teacher_backend`.",
    "tensor_parallel_size": "GPUs that share one copy of its weights; see "
    "[tensor_parallel.md](tensor_parallel.md).",
    "urls": "Backend `server`: list of the addresses of its replicas, like `http://127.0.0.1:8000`.",
    "api_key_env": "Backend `server`: name of the environment variable with its API key. The key "
    "itself is written to no file.",
    "allow": "List of what it may have otherwise than the student: `eos`, `template`, `rendering`; "
    "see [teachers.md](teachers.md#what-must-agree).",
    "teacher_prompt": "What it reads in place of the student's prompt, as `--teacher_prompt`: a "
    "column, a text, `system:TEXT` or `python:MODULE:FUNCTION`; see "
    "[teacher_prompts.md](teacher_prompts.md).",
    "teacher_chat_template_kwargs": "Variables of the chat template in what it reads: an object.",
    "max_teacher_prompt_tokens": "Longest prompt of its own, in tokens. Default: "
    "`--max_teacher_prompt_tokens`, or what the data needs.",
}


NO_DEFAULT = (
    "domains",
    "backend",
    "urls",
    "allow",
    "adapter",
    "max_teacher_prompt_tokens",
)  # none, or one that the text says


def type_text(hint: Any) -> str:
    """What may be written behind a flag."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return " or ".join(map(type_text, inner))  # nothing is the default, and no value says it
    if get_origin(hint) is list:
        return "list of text"
    return {str: "text", bool: "switch", int: "whole number", float: "number"}[hint]


def default_of(field: dataclasses.Field) -> str:
    value = (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == "" or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


TABLE_HEAD = ["| flag | value | default | meaning |", "|---|---|---|---|"]


def rows_of(group: type) -> dict[str, str]:
    """Flag -> its row, in the order of the fields."""
    hints = get_type_hints(group)
    rows = {}
    for f in dataclasses.fields(group):
        meaning = f.metadata["help"].replace("|", chr(92) + "|")
        rows[f.name] = (
            f"| `--{f.name}` | {type_text(hints[f.name])} | {default_of(f)} | {meaning} |"
        )
    return rows


def table(title: str, rows: list[str]) -> str:
    return "\n".join([title, *TABLE_HEAD, *rows, ""])


def everyday_rows(rows: dict[str, dict[str, str]], mopd: dict, gkd: dict) -> list[str]:
    """The rows of the first half; a flag that one script alone has says so."""
    chosen = {}
    for name, own in rows.items():
        script = "train_gkd.py" if name not in mopd else "train_mopd.py" if name not in gkd else ""
        only = f" `{script}` only. |" if script else " |"
        chosen |= {flag: row.removesuffix(" |") + only for flag, row in own.items()}
    return [chosen[flag] for flag in EVERYDAY]


def page() -> str:
    """The whole text of docs/config.md."""
    mopd, gkd = groups_of(train_mopd.Config), groups_of(train_gkd.Config)
    groups = {name: {**gkd, **mopd}[name] for name in TITLES}
    assert groups == {**gkd, **mopd}, (
        f"groups without a title: {(mopd.keys() | gkd.keys()) - groups.keys()}"
    )
    rows = {name: rows_of(group) for name, group in groups.items()}
    text = INTRODUCTION + table(EVERYDAY_TITLE, everyday_rows(rows, mopd, gkd)) + TEACHERS_NOTE
    for f in (f for f in dataclasses.fields(TeacherSpec) if f.name in TEACHER_KEYS):
        default = "" if f.name in NO_DEFAULT else default_of(f)
        text += f"| `{f.name}` | {default} | {TEACHER_KEYS[f.name]} |\n"
    text += EXPERT_TITLE
    for name, own in rows.items():
        rest = [row for flag, row in own.items() if flag not in EVERYDAY]
        if rest:
            text += table(f"\n### {TITLES[name]}\n", rest)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="compare only; exit status 1 if the page is stale"
    )
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print(
            f"{PAGE.relative_to(ROOT)} is stale: run python scripts/make_config_docs.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
