"""The house rules that a machine can check: who imports whom, the frozen flags, files that parse,
pages that are true.
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

import train_gkd
import train_mopd
from opd import config, distillation, losses, options
from opd.inputs import validation
from opd.inputs.arguments import parse
from tests.support.processes import ROOT

SCRIPTS = {"train_mopd.py": train_mopd.Config, "train_gkd.py": train_gkd.Config}
PACKAGE = sorted(path for path in (ROOT / "opd").rglob("*.py") if path.name != "__init__.py")
SOURCES = [*PACKAGE, *(ROOT / name for name in SCRIPTS)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MAIN_LINES = 500, 60, 45
ONLY_IMPORTER = {
    "deepspeed": "opd/engines/deepspeed_engine.py",
    "vllm": "opd/engines/vllm_process.py",
}

# The flags are a contract: a name that changes breaks somebody's command line. Add here, never
# rename.
MOPD_FLAGS = re.findall(
    r"\w+",
    """
student_model dtype gradient_checkpointing freeze_vision attn_implementation trust_remote_code
teacher teacher_backend teacher_residency allow
teacher_prompt teacher_chat_template_kwargs max_teacher_prompt_tokens
teacher_mode teacher_wait_s teacher_timeout_s teacher_max_inflight
data eval_data domain_key prompt_key chat_template_kwargs system_prompt answer_key response_key domain_weights max_prompt_tokens images_key bad_images allow_urls overlong_prompts
prompts_per_step num_generations max_response_tokens temperature top_p top_k stop_token_ids rollout_kv_cache_gib enforce_eager
rollout_tensor_parallel_size
teacher_kv_cache_gib teacher_cache_bytes
loss support support_k tail estimator jsd_beta skew_alpha loss_temperature advantage_clip clip_low clip_high dual_clip
old_logprobs is_mode is_level is_low is_high reject_level reject_low reject_high
reward_weight reward_fn overlap_k loss_chunk_bytes
micro_batch_size max_tokens_per_micro_batch packing inner_updates offload_student
lora_r lora_alpha lora_dropout lora_targets lora_modules_to_save lora_sync merge_on_export
learning_rate lr_schedule warmup_steps min_lr_ratio weight_decay adam_beta1 adam_beta2 adam_eps max_grad_norm
output_dir num_steps seed ds_config eval_every eval_max_prompts save_every time_limit keep_checkpoints parity_every rollout_samples
rollout_every report_to push_to_hub resume allow_change plan ignore_plan dry_run local_rank
""",  # noqa: E501
)
AHEAD_FLAGS = re.findall(
    r"\w+",
    """
mode max_staleness sync_every partial_rollout rollout_servers rollout_replicas max_inflight rollout_timeout_s rollout_wait_s
weights_dir rollout_gpus logprob_servers logprob_replicas logprob_gpus
""",  # noqa: E501
)
GKD_FLAGS = [*MOPD_FLAGS, "lmbda", "seq_kd", "seq_kd_temperature", "sft_alpha"]


def flags_of(config_class) -> set[str]:
    return {
        name for group in options.groups_of(config_class).values() for name in get_type_hints(group)
    }


# ---- Who imports whom: import-linter's contracts in pyproject.toml, and these --------------------


def imports_of(source: str) -> set[str]:
    """Everything that a source imports, inside functions too, with dots:
    `vllm.config.PoolerConfig`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def importers_of(library: str, sources: dict[str, str]) -> set[str]:
    return {
        name
        for name, text in sources.items()
        if library in {item.split(".")[0] for item in imports_of(text)}
    }


def test_the_contracts_of_import_linter_hold():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(("library", "importer"), ONLY_IMPORTER.items())
def test_an_engine_library_has_one_importer(library, importer):
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    assert importers_of(library, sources) == {importer}
    for line in (
        "import vllm",
        "from vllm.config import PoolerConfig",
        "def f():\n    import vllm.envs as e",
    ):
        assert importers_of("vllm", {"a": line}) == {"a"}


def test_the_package_imports_no_script():
    scripts = {"scripts", *(Path(name).stem for name in SCRIPTS)}
    for path in SOURCES:
        assert not scripts & {item.split(".")[0] for item in imports_of(path.read_text())}, path


def defined_in(source: str) -> set[str]:
    """Names of functions, classes and constants at the top of a file."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            }
    return found


def test_a_name_is_defined_in_one_file():
    where: dict[str, list[str]] = {}
    for path in PACKAGE:
        for name in defined_in(path.read_text()):
            where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in where.items() if len(files) > 1}


def test_whoever_joins_the_ranks_ends_in_one_place():
    """Elsewhere the interpreter would take the groups down, and now and then abort a program that
    has done its work.
    """
    helpers = {  # called by programs that end there, or by pytest
        "opd/distributed.py",
        "opd/run/prepare.py",
        "opd/servers/scoring_engine.py",
        "scripts/measure/gpu_engines.py",
        "scripts/measure/gpu_training.py",
        "tests/conftest.py",
    }
    joins = re.compile(r"(distributed\.init|init_process_group|join_alone)\(")
    files = [
        path for folder in ("opd", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    texts = {
        str(path.relative_to(ROOT)): path.read_text()
        for path in [*files, *(ROOT / name for name in SCRIPTS)]
    }
    joining = {name for name, text in texts.items() if joins.search(text)}
    assert joining >= helpers
    assert not [name for name in joining - helpers if "exit_together(" not in texts[name]]


def test_a_loss_needs_no_engine():
    assert (ROOT / "opd" / "__init__.py").read_text() == ""
    code = (
        "import sys, opd.losses; print([name for name in ('vllm', 'deepspeed') if name in "
        "sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert run.stdout.strip() == "[]"


# ---- Size and words ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_main = node.name == "main" and path.name in SCRIPTS
            length = node.end_lineno - node.lineno + 1
            assert length <= (MAX_MAIN_LINES if is_main else MAX_FUNCTION_LINES), (
                f"{node.name}: {length} lines"
            )


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_public_functions_and_classes_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    definitions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert not [
        d.name for d in definitions if not d.name.startswith("_") and not ast.get_docstring(d)
    ]


# ---- Flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags"),
    [("train_mopd.py", [*MOPD_FLAGS, *AHEAD_FLAGS]), ("train_gkd.py", GKD_FLAGS)],
)
def test_flags_are_frozen(script, flags):
    assert flags_of(SCRIPTS[script]) == set(flags)


def test_choices_of_the_flags_are_those_of_the_losses():
    hints = get_type_hints(config.LossConfig)
    choices = {
        name: set(get_args(hints[name]))
        for name in ("loss", "support", "tail", "estimator", "is_mode", "is_level", "reject_level")
    }
    assert choices["loss"] == {*losses.DIVERGENCES, "reverse_kl_pg"}
    assert choices["tail"] == set(losses.TAILS)
    assert choices["estimator"] == {"auto", *losses.ESTIMATORS}
    assert choices["is_mode"] == set(losses.IMPORTANCE_MODES)
    assert choices["is_level"] == set(losses.IMPORTANCE_LEVELS)
    assert choices["reject_level"] == set(losses.REJECTION_LEVELS)
    for support in choices["support"]:
        distillation.payload_of(config.LossConfig(support=support))


# ---- Files that a reader copies ------------------------------------------------------------------


def parsed(script: str, argv: list[str]):
    """A configuration that passed `validate`; raises ValueError as the script would print it."""
    cfg = parse(SCRIPTS[script], argv)
    cfg.validate()
    return cfg


def script_of_yaml(content: dict) -> str:
    only_gkd = set(GKD_FLAGS) - set(MOPD_FLAGS)
    return "train_gkd.py" if set(content) & only_gkd else "train_mopd.py"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.yaml")), ids=lambda path: path.name
)
def test_yaml_files_of_scripts_are_valid_configurations(path):
    content = yaml.safe_load(path.read_text())
    assert (
        parsed(script_of_yaml(content), ["--config", str(path)]).model.student_model
        == content["student_model"]
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name
)
def test_ds_configs_hold_sharding_only(path):
    assert "zero_optimization" in validation.load_ds_config(str(path))


def code_blocks(text: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)


def launches(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command line of a shell text that runs a trainer."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#") or not any(script in line for script in SCRIPTS):
            continue
        words = shlex.split(line, comments=True)
        for script in SCRIPTS:
            if script in words:
                found.append((script, words[words.index(script) + 1 :]))
    return found


def shell_texts() -> dict[str, str]:
    texts = {path.name: path.read_text() for path in sorted((ROOT / "scripts").rglob("*.sh"))}
    return texts | {
        path.name: "\n".join(code_blocks(path.read_text(), "(?:bash|sh)")) for path in PAGES
    }


def test_launch_lines_are_found():
    text = 'deepspeed --num_gpus 8 train_mopd.py \\\n  --loss jsd "$@"  # why\n# torchrun train_gkd.py --old\nls'  # noqa: E501
    assert launches(text) == [("train_mopd.py", ["--loss", "jsd", "$@"])]
    assert launches(shell_texts()["README.md"]) and launches(shell_texts()["quickstart.sh"])


@pytest.mark.parametrize(("source", "text"), shell_texts().items(), ids=shell_texts())
def test_every_flag_behind_a_trainer_exists(source, text):
    for script, arguments in launches(text):
        flags = {
            word[2:].partition("=")[0].replace("-", "_")
            for word in arguments
            if word.startswith("--")
        }
        assert flags <= {"config", *flags_of(SCRIPTS[script])}, f"{source}: {script}"
        if "config" not in flags and "$@" not in arguments:
            parsed(script, arguments)  # a whole command: its values are right too


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_yaml_on_a_page_is_a_valid_configuration(path, tmp_path):
    required = {"student_model": "s", "data": ["d.jsonl"], "output_dir": "o"}
    for block in code_blocks(path.read_text(), "yaml"):
        content = required | yaml.safe_load(block)
        file = tmp_path / "page.yaml"
        file.write_text(yaml.safe_dump(content))
        assert (
            parsed(script_of_yaml(content), ["--config", str(file)]).run.output_dir
            == content["output_dir"]
        )


def test_the_page_of_flags_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "make_config_docs.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
