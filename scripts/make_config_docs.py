"""Write docs/config.md from the configuration dataclasses of the two trainers.

`python scripts/make_config_docs.py` writes the page; with `--check` it only compares, and exits 1 if the page is stale.
"""

import argparse
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gkd
import train_mopd
from opd.config import TeacherSpec, groups_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"

INTRODUCTION = """# Flags

Made by `python scripts/make_config_docs.py` from the configuration dataclasses; a test compares the two. Do not edit.

Each row is a flag (`--num_steps 200`) and a key of the YAML file that `--config FILE` names (`num_steps: 200`). The
command line wins over the file. Lists take several values: `--data a.jsonl b.jsonl`, or a YAML list; NAME=WEIGHT pairs
may also be a YAML mapping. A switch is turned on by its bare name (`--dry_run`) or by `true`, and off by `false`. An
unknown flag or key is an error that offers the nearest name.
"""

TITLES = {
    "model": "Model",
    "teacher": "Teachers",
    "data": "Data",
    "rollout": "Prompts and responses",
    "ahead": "Asynchronous rollouts (`train_mopd.py` only)",
    "loss": "Loss",
    "gkd": "Generalized Knowledge Distillation (`train_gkd.py` only)",
    "batch": "Batch",
    "optim": "Optimizer",
    "run": "Run",
}

TEACHERS_NOTE = """
The YAML key `teachers` is a list with one entry per teacher. It takes the place of `--teacher`; a `--teacher` on the
command line replaces the whole list. The teachers of one domain are a mixture: their weights are divided by their sum.

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
    "model": "A Hugging Face model directory or hub id. With backend `server`: the model's name there, or a local directory "
    "of the same model; may be left out.",
    "domains": 'List of the domains it takes, or `"*"`: every domain that no other teacher names. Default: its own name.',
    "weight": "Share in the domains that it shares with other teachers, relative to theirs; every one of them needs it. A "
    "teacher of weight 0 takes no part.",
    "backend": "`vllm`, `hf` or `server`, see [teachers.md](teachers.md). Default: `--teacher_backend`.",
    "tensor_parallel_size": "GPUs that share one copy of its weights; see [tensor_parallel.md](tensor_parallel.md).",
    "urls": "Backend `server`: list of the addresses of its replicas, like `http://127.0.0.1:8000`.",
    "api_key_env": "Backend `server`: name of the environment variable with its API key. The key itself stands in no file.",
}


NO_DEFAULT = ("domains", "backend", "urls")  # none, or one that the text says


def type_text(hint: Any) -> str:
    """What may be written behind a flag."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [a for a in get_args(hint) if a is not type(None)]
        return type_text(inner)  # nothing is the default, and no value says it
    if get_origin(hint) is list:
        return "list of text"
    return {str: "text", bool: "switch", int: "whole number", float: "number"}[hint]


def default_of(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == "" or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def group_section(name: str, group: type) -> str:
    """The table of one configuration group."""
    hints = get_type_hints(group)
    rows = [
        f"| `--{f.name}` | {type_text(hints[f.name])} | {default_of(f)} | {f.metadata['help'].replace('|', chr(92) + '|')} |"
        for f in dataclasses.fields(group)
    ]
    return "\n".join([f"\n## {TITLES[name]}\n", "| flag | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def page() -> str:
    """The whole text of docs/config.md."""
    mopd, gkd = groups_of(train_mopd.Config), groups_of(train_gkd.Config)
    groups = {name: {**gkd, **mopd}[name] for name in TITLES}
    assert groups == {**gkd, **mopd}, f"groups without a title: {(mopd.keys() | gkd.keys()) - groups.keys()}"
    text = INTRODUCTION
    for name, group in groups.items():
        text += group_section(name, group)
        if name == "teacher":
            keys = dataclasses.fields(TeacherSpec)
            text += TEACHERS_NOTE + "".join(
                f"| `{f.name}` | {'' if f.name in NO_DEFAULT else default_of(f)} | {TEACHER_KEYS[f.name]} |\n"
                for f in keys
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="compare only; exit status 1 if the page is stale")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.relative_to(ROOT)} is stale: run python scripts/make_config_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
