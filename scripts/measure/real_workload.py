"""A workload of a real model, for benchmarks: SmolLM2 and questions that people wrote."""

import json
import os
from pathlib import Path

from transformers import AutoTokenizer

from scripts.demos import get_questions, get_smollm2
from scripts.make_demo import write_jsonl
from scripts.measure.runs import Workload
from scripts.measure.tools import read_jsonl

MOST_QUESTIONS = 468  # of a domain
UNUSED = {"token": "<gh_stars>", "id": 7}  # of SmolLM2's vocabulary
ENDLESS = {
    "config.json": {"eos_token_id": UNUSED["id"]},
    "generation_config.json": {"eos_token_id": UNUSED["id"], "pad_token_id": UNUSED["id"]},
    "tokenizer_config.json": {"eos_token": UNUSED["token"], "pad_token": UNUSED["token"]},
}


def write_smollm2(root: Path, workload: Workload, *, steps: int) -> None:
    """`teacher`, SmolLM2-135M-Instruct, `student`, some of its layers, and `prompts.jsonl`, as many
    as all steps need. Models and questions are downloaded, and kept in $OPD_CACHE or ~/.cache/opd.

    A token of its vocabulary that no text has takes the place of EOS, so that no response ends
    early.
    """
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")
    layers, _ = workload.student
    whole, student = cache / "smollm2", cache / f"smollm2_{layers}"
    get_smollm2.get(whole, student, layers)
    root.mkdir(parents=True, exist_ok=True)
    for name, source in (("teacher", whole), ("student", student)):
        target = root / name
        target.mkdir()
        (target / "model.safetensors").symlink_to(source / "model.safetensors")
        for path in source.glob("*.json*"):
            (target / path.name).write_text(path.read_text())
        for path in source.glob("*.jinja"):
            (target / path.name).write_text(path.read_text())
        for file, changes in ENDLESS.items():
            content = json.loads((target / file).read_text())
            (target / file).write_text(json.dumps({**content, **changes}))
    get_questions.get(root / "questions", MOST_QUESTIONS)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    rows = []
    for row in read_jsonl(root / "questions" / "train.jsonl"):
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        if len(ids) <= workload.prompt_tokens:
            rows.append({"data_source": "teacher", "prompt": row["prompt"]})
    write_jsonl(root / "prompts.jsonl", rows[: steps * workload.prompts])
