"""Which model families can be distilled: every family trains two steps as its own teacher, or is
refused in one line.

A tiny random model S of the family (`scripts/measure/families.py`) is the student of three
teachers: itself run by vLLM, itself run by transformers, and another random model of the family. A
family is *right* when student, sampler and teachers compute the same: in the first step the
divergence from itself is 0, and the log-probabilities of sampler and student agree in both steps,
the second of which comes after a push of changed weights. A family is *refused* when the run ends
before its first step with status 2 and one line on the console. Anything else is a fault.

    python scripts/check_families.py                       # a short list
    python scripts/check_families.py --families gpt2,opt
    python scripts/check_families.py --all --output docs/models.md

A family that is refused as a student is tried as a teacher of another model: its loss on given
responses must be the one that transformers computes. Logs stay in the directory that the first line
names. The exit status is 1 if there is a fault.

Shape suffixes: L tokens of a response, T of prompt and response, V vocabulary.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_demo import LETTERS, make_tokenizer, write_jsonl
from scripts.measure.families import BY_NAME, FAMILIES, Family, save
from scripts.measure.forked import run_forked
from scripts.measure.tools import ROOT, read_jsonl

# domains that the student itself teaches, and what runs it there
SELF = {"same": "vllm", "samehf": "hf"}
PROMPTS = 6  # of each domain: all of them in each step
# nats, float32: rounding of two implementations is below it, a dropped bias is not
TOLERANCE = 1e-4
TIMEOUT_S = 300
SEE_STUDENT = "see student"
COMMON = {
    "num_steps": 2,
    "prompts_per_step": PROMPTS * 3,
    "micro_batch_size": PROMPTS,
    "num_generations": 1,
    "max_prompt_tokens": 16,
    "max_response_tokens": 12,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "dtype": "float32",
    "loss": "reverse_kl",
    "support": "full",
    "enforce_eager": True,
    "rollout_kv_cache_gib": 0.05,
    "teacher_kv_cache_gib": 0.05,
}


@dataclass(frozen=True)
class Outcome:
    """What is left of a run."""

    status: int | None  # None: it ran out of time
    stderr: str
    rows: list[dict] = field(default_factory=list)  # of metrics.jsonl


@dataclass(frozen=True)
class Verdict:
    """`kind` is right, refused or fault; `reason` is empty where it is right."""

    kind: str
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def judge(outcome: Outcome) -> Verdict:
    """Of the run in which the student is its own teacher."""
    ended = _judge_end(outcome)
    if ended is not None:
        return ended
    if len(outcome.rows) != COMMON["num_steps"]:
        return Verdict(
            "fault", f"{len(outcome.rows)} steps in metrics.jsonl, expected {COMMON['num_steps']}"
        )
    first, last = outcome.rows
    figures = {"mismatch 1": first["mismatch/abs_max"], "mismatch 2": last["mismatch/abs_max"]}
    for domain in SELF:
        figures[f"loss {domain}"] = abs(first[f"loss/total/{domain}"])
        figures[f"k1 {domain}"] = abs(first[f"distill/k1/{domain}"])
    wrong = [f"{name} {value:.2g}" for name, value in figures.items() if not value < TOLERANCE]
    other = first["loss/total/other"]
    # else this family's models are all alike, and nothing was tested
    if not other > 100 * TOLERANCE:
        wrong.append(f"loss of another model {other:.2g}, expected more")
    return Verdict("fault" if wrong else "right", ", ".join(wrong), figures)


def judge_teacher(outcome: Outcome, expected: float) -> Verdict:
    """Of a run with given responses: its loss must be the `expected` one."""
    ended = _judge_end(outcome)
    if ended is not None:
        return ended
    if not outcome.rows:
        return Verdict("fault", "no steps in metrics.jsonl")
    found = outcome.rows[0]["loss/total"]
    if not abs(found - expected) < TOLERANCE * max(1.0, expected):
        return Verdict("fault", f"loss {found:.6f}, transformers says {expected:.6f}")
    return Verdict("right", figures={"loss": found})


def _judge_end(outcome: Outcome) -> Verdict | None:
    """None for a run that ended well."""
    if outcome.status == 0:
        return None
    if outcome.status is None:
        return Verdict("fault", f"not done after {TIMEOUT_S} s")
    lines = outcome.stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if (
        outcome.status == 2
        and len(errors) == 1
        and not outcome.rows
        and "Traceback" not in outcome.stderr
    ):
        return Verdict("refused", errors[0])
    last = (errors or [line for line in lines if line.strip()] or ["nothing on the console"])[-1]
    return Verdict("fault", f"status {outcome.status}: {last[:300]}")


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    family: str
    student: Verdict
    teachers: dict[str, Verdict]  # by backend
    seconds: float

    @property
    def is_fault(self) -> bool:
        return any(verdict.kind == "fault" for verdict in (self.student, *self.teachers.values()))


def run_trainer(script: str, config: dict, directory: Path) -> Outcome:
    """A trainer in a process of its own, with its console and run in `directory`."""
    directory.mkdir(parents=True)
    settings = directory / "config.yaml"
    settings.write_text(yaml.safe_dump(config | {"output_dir": str(directory / "run")}))
    command = [str(ROOT / script), "--config", str(settings)]
    status = run_forked(command, directory / "stdout", directory / "stderr", TIMEOUT_S)
    metrics = directory / "run" / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.is_file() else []
    rows = [row for row in rows if "loss/total" in row]
    return Outcome(status, (directory / "stderr").read_text(errors="replace"), rows)


def check_family(family: Family, scratch: Path) -> Result:
    """Runs a family as student and teacher, and as a teacher alone if it is refused."""
    start, root, tokenizer = time.monotonic(), scratch / family.name, make_tokenizer()
    for seed, name in enumerate(("student", "other")):
        save(family, tokenizer, root / name, seed)
    write_rows(root / "data.jsonl", (*SELF, "other"))
    teachers = [
        {"name": name, "model": str(root / "student"), "backend": SELF[name]} for name in SELF
    ]
    teachers.append({"name": "other", "model": str(root / "other"), "backend": "vllm"})
    teachers = [{**entry, "domains": [entry["name"]]} for entry in teachers]
    config = {
        **COMMON,
        "student_model": str(root / "student"),
        "teachers": teachers,
        "parity_every": 1,
    }
    student = judge(
        run_trainer(
            "train_mopd.py", {**config, "data": [str(root / "data.jsonl")]}, root / "as_student"
        )
    )
    if student.kind == "refused":
        verdicts = {backend: check_teacher(family, root, backend) for backend in SELF.values()}
    else:
        verdicts = {
            backend: Verdict(student.kind, student.reason and SEE_STUDENT)
            for backend in SELF.values()
        }
    return Result(family.name, student, verdicts, round(time.monotonic() - start, 1))


def check_teacher(family: Family, root: Path, backend: str) -> Verdict:
    """The family's model teaches a small Qwen3 on given responses."""
    student, teacher = root / "qwen3", root / "student"
    if not student.is_dir():
        save(BY_NAME["qwen3_untied"], make_tokenizer(), student, seed=2)
    config = {key: value for key, value in COMMON.items() if key != "num_steps"}
    config |= {
        "num_steps": 1,
        "prompts_per_step": PROMPTS,
        "lmbda": 0.0,
        "data": [str(root / "responses.jsonl")],
    }
    config |= {"student_model": str(student), "teachers": [_only_teacher(teacher, backend)]}
    write_rows(root / "responses.jsonl", ("all",))
    outcome = run_trainer("train_gkd.py", config, root / f"as_teacher_{backend}")
    if outcome.status != 0:
        return judge_teacher(outcome, 0.0)
    return judge_teacher(outcome, expected_loss(student, teacher, root / "responses.jsonl"))


def _only_teacher(model: Path, backend: str) -> dict:
    return {"name": "all", "model": str(model), "domains": "*", "backend": backend}


@torch.no_grad()
def expected_loss(student: Path, teacher: Path, data: Path) -> float:
    """Reverse KL per token of the responses in `data`, as transformers alone computes it, in its
    plainest attention.
    """
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for path in (student, teacher)
    ]
    total = count = 0
    for row in read_jsonl(data):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        response = [
            *tokenizer.encode(row["response"], add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        response = response[: COMMON["max_response_tokens"]]
        ids_1T = torch.tensor([prompt + response])
        s_LV, t_LV = (
            model(ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in models
        )
        total += float((s_LV.exp() * (s_LV - t_LV)).sum())
        count += len(response)
    return total / count


def write_rows(path: Path, domains: tuple[str, ...]) -> None:
    """Prompts and responses of random letters."""
    rng = random.Random(0)
    rows = []
    for domain in domains:
        for _ in range(PROMPTS):
            word = "".join(rng.choices(LETTERS, k=rng.randint(3, 7)))
            prompt = [{"role": "user", "content": word + "="}]
            rows.append(
                {"data_source": domain, "prompt": prompt, "response": word[::-1] + word[:3]}
            )
    write_jsonl(path, rows)


def table(results: list[Result]) -> str:
    """The page docs/models.md."""
    learn, by_vllm, by_hf = (
        sum(verdict.kind == "right" for verdict in column)
        for column in zip(
            *((result.student, *result.teachers.values()) for result in results), strict=True
        )
    )
    lines = [
        "# Model families",
        "",
        "`python scripts/check_families.py --all --output docs/models.md` wrote this page. Each "
        "row is a tiny random model of",
        "the family's own configuration class, in float32 on a CPU, that was student and teacher "
        "for two steps. *yes* means:",
        f"student, sampler and teacher agreed within {TOLERANCE} nats per token, also after the "
        "weights had changed and were",
        "pushed. *no* means: the run was refused at its start, with the line in the last column. "
        "`mismatch` is the largest",
        "difference between the log-probabilities of sampler and student at a sampled token, in "
        "nats, after the push.",
        "",
        f"Of {len(results)} families {learn} learn, {by_vllm} teach through vLLM and {by_hf} "
        "through transformers.",
        "",
        "| family | `model_type` | models | student | teacher, `vllm` | teacher, `hf` | mismatch | "
        "reason |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        family = BY_NAME[result.family]
        mismatch = result.student.figures.get("mismatch 2")
        words = {"right": "yes", "refused": "no", "fault": "**wrong**"}
        answers = [words[verdict.kind] for verdict in (result.student, *result.teachers.values())]
        told = [
            result.student,
            *(verdict for verdict in result.teachers.values() if verdict.kind == "fault"),
        ]
        reasons = dict.fromkeys(
            _short(verdict.reason) for verdict in told if verdict.reason not in ("", SEE_STUDENT)
        )
        cells = [
            family.name,
            f"`{family.model_type}`",
            family.published,
            *answers,
            "" if mismatch is None else f"{mismatch:.0e}",
            "; ".join(reasons),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """Without what is of this machine: the flag and the path in front, and where the log lies.

    Safe in a table.
    """
    reason = re.sub(r"^--\w+( \w+)? /\S+: ", "", reason)
    reason = re.sub(r"; the traceback is in \S+", "", reason)
    return re.sub(r"/\S+/", "", reason).replace("|", "\\|")


def report(result: Result) -> str:
    """One line of the console."""
    figures = ", ".join(f"{name} {value:.1e}" for name, value in result.student.figures.items())
    teachers = ", ".join(
        f"teacher {backend} {verdict.kind}" for backend, verdict in result.teachers.items()
    )
    reason = result.student.reason or figures
    return (
        f"{result.family:<18}{result.student.kind:<9}{result.seconds:>6.0f} s  {teachers}  {reason}"
    )


def chosen(names: str, everything: bool) -> list[Family]:
    """The families to check. ValueError for a name that is none."""
    if not names:
        return [family for family in FAMILIES if everything or family.telling]
    unknown = [name for name in names.split(",") if name not in BY_NAME]
    if unknown:
        raise ValueError(f"--families {unknown[0]}: no such family; choose of {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--families", default="", help="names from scripts/measure/families.py, by commas"
    )
    parser.add_argument("--all", action="store_true", help="every family: half an hour")
    parser.add_argument(
        "--jobs", type=int, default=1, help="families at a time, each with a core and 4 GB"
    )
    parser.add_argument(
        "--output", type=Path, help="where the table is written, such as docs/models.md"
    )
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument(
        "--scratch", type=Path, help="where models and logs go; default: a new directory in /tmp"
    )
    args = parser.parse_args()
    try:
        families = chosen(args.families, args.all)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="families_"))
    print(f"logs: {scratch}", flush=True)
    results = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        for family in families:
            shutil.rmtree(scratch / family.name, ignore_errors=True)
            jobs.append(pool.submit(check_family, family, scratch))
        for job in as_completed(jobs):
            result = job.result(timeout=0)  # it is done
            results[result.family] = result
            print(report(result), flush=True)
            done = [results[family.name] for family in families if family.name in results]
            if args.json:
                args.json.write_text(
                    json.dumps([asdict(result) for result in done], indent=1) + "\n"
                )
            if args.output:
                args.output.write_text(table(done))
    faults = [name for name, result in results.items() if result.is_fault]
    print(
        f"{len(results)} families, {len(faults)} with "
        f"faults{': ' if faults else ''}{', '.join(faults)}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
