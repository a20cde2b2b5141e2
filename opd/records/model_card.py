"""The model card: what a trained model was made of, as the README.md of its directory."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from opd.config import TeacherSpec
from opd.log import redact_config
from opd.options import options_of, to_dict

_HUB_ID = re.compile(r"(?![./~])[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE_TYPES = (".jsonl", ".json", ".parquet")
TAGS = ("on-policy-distillation", "distillation")


def model_card(cfg, program: str, report: dict[str, Any] | None, *, sees: bool = False) -> str:
    """README.md of the model that `program`, a trainer's file name, made by a script's Config; the
    model may be one that `sees` images.

    `report` is the content of report.json, or None for a run without held-out prompts. No secret is
    in it: what `config.yaml` hides is hidden here.
    """
    said = redact_config(to_dict(cfg))
    parts = [
        _header(said, sees),
        f"# {Path(said['student_model'].partition('@')[0]).name}, distilled on-policy",
        _models(said),
        _training_rows(said),
        _recovery_rows(report),
        _command(cfg, said, program),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(said: dict[str, Any], sees: bool) -> str:
    """The YAML that the hub reads. It takes no paths, so a local directory is named in the text
    only.
    """
    base, data = _hub_ids([said["student_model"]]), _hub_ids(said["data"])
    header = {"base_model": base[0]} if base else {}
    is_adapter = said["lora_r"] > 0 and not said["merge_on_export"]
    header |= {"library_name": "peft" if is_adapter else "transformers"}
    header |= {"pipeline_tag": "image-text-to-text" if sees else "text-generation"}
    header |= {"tags": [*TAGS, *(["lora"] if said["lora_r"] else [])]}
    if data:
        header["datasets"] = data
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _hub_ids(names: Sequence[str]) -> list[str]:
    """Those that are no paths, without their revisions."""
    return [
        name.partition("@")[0]
        for name in names
        if _HUB_ID.fullmatch(name) and not name.endswith(_FILE_TYPES) and not Path(name).exists()
    ]


def _models(said: dict[str, Any]) -> str:
    rows = [("student", said["student_model"], "")]
    for teacher in said["teachers"]:
        domains = "every other" if teacher["domains"] == "*" else ", ".join(teacher["domains"])
        weight = "" if teacher["weight"] is None else f", weight {teacher['weight']:g}"
        model = " + ".join(filter(None, (teacher["model"] or "served", teacher["adapter"])))
        rows.append((f"teacher {teacher['name']}", model, domains + weight))
    return "The student wrote, and its teachers scored each token that it wrote.\n\n" + _table(
        ("role", "model", "domains"), rows
    )


def _training_rows(said: dict[str, Any]) -> str:
    loss = f"{said['loss']} on the support {said['support']}"
    if said["reward_weight"]:
        loss += f", and the task reward {', '.join(said['reward_fn'])} x {said['reward_weight']:g}"
    prompts = f"{said['prompts_per_step']} prompts x {said['num_generations']} responses"
    rows = [
        ("data", ", ".join(said["data"])),
        ("held-out data", ", ".join(said["eval_data"]) or "none"),
        ("loss", loss),
        ("steps", f"{said['num_steps']}, of {prompts} each"),
        ("learning rate", f"{said['learning_rate']:g}, {said['lr_schedule']}"),
        *_adapter_row(said),
        ("longest prompt and response", f"{said['max_prompt_tokens']} and "
         f"{said['max_response_tokens']} tokens"),
        ("seed", str(said["seed"])),
    ]  # fmt: skip
    return "## Training\n\n" + _table(("what", "value"), rows)


def _adapter_row(said: dict[str, Any]) -> list[tuple[str, str]]:
    if not said["lora_r"]:
        return []
    where = "merged into this model" if said["merge_on_export"] else "in this directory"
    targets = ", ".join(said["lora_targets"])
    return [("adapter", f"LoRA of rank {said['lora_r']}, alpha {said['lora_alpha']}, on {targets}; "
             f"{where}")]  # fmt: skip


def _recovery_rows(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    rows = []
    for domain, entry in report["domains"].items():
        scores = (_score_cell(entry[key]) for key in ("student_before", "student_after", "teacher"))
        interval = " to ".join(f"{bound:.1%}" for bound in entry["ci95"] or ()) or "-"
        share = "-" if entry["recovery"] is None else f"{entry['recovery']:.1%}"
        rows.append((domain, str(entry["n"]), *scores, share, interval))
    header = ("domain", "prompts", "before", "after", "teacher", "recovery", "95 % interval")
    return (
        "## Recovery\n\nMean scores of greedy answers to held-out prompts; recovery is (after - "
        "before) / (teacher - before).\n\n" + _table(header, rows)
    )


def _score_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _command(cfg, said: dict[str, Any], program: str) -> str:
    """What differs from the defaults, as the YAML file that `--config` reads."""
    given = {
        flag.name: said[flag.name]
        for _, flag, value in options_of(cfg)
        if flag.name in said and flag.name != "local_rank" and value != _default_of(flag)
    }
    entries = [
        {k: v for k, v in entry.items() if k in ("name", "model") or v != _default_entry(k)}
        for entry in said["teachers"]
    ]
    text = yaml.safe_dump(
        {**given, "teachers": entries}, sort_keys=False, allow_unicode=True, width=1000
    )
    return f"## Command\n\n```bash\npython {program} --config run.yaml\n```\n\n```yaml\n{text}```"


def _default_of(flag: dataclasses.Field) -> Any:
    has_factory = flag.default_factory is not dataclasses.MISSING
    return flag.default_factory() if has_factory else flag.default


def _default_entry(key: str) -> Any:
    defaults = {f.name: f.default for f in dataclasses.fields(TeacherSpec)}
    value = defaults[key]
    return list(value) if isinstance(value, tuple) else value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # a bar would end the cell
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines
    )
