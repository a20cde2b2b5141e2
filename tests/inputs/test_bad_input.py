"""Every mistake of a user through the door that users take: one line on stderr, status 2, and no
weight loaded.
"""

import dataclasses
import json
import shutil
from datetime import datetime

import pytest
from transformers import AttentionInterface, MambaConfig, MambaForCausalLM

import train_gkd
import train_mopd
from opd.inputs.arguments import parse
from opd.inputs.identity import fingerprint_of
from opd.ops.packed_attention import PACKED
from opd.options import to_dict
from opd.records import checkpoint
from opd.run.build import build_student
from opd.run.evaluation import asked
from opd.run.prepare import prepare, read_inputs, user_errors
from opd.types import LoopState

pytestmark = pytest.mark.usefixtures("device")


def arguments(tiny, output_dir) -> list[str]:
    return [
        *("--student_model", str(tiny.student), "--output_dir", str(output_dir)),
        *("--data", str(tiny.train)),
        *(f"--teacher=addition={tiny.addition}", f"--teacher=reversal={tiny.reversal}"),
        *("--prompts_per_step", "8", "--max_prompt_tokens", "16", "--max_response_tokens", "8"),
    ]


def mistake(capsys, argv: list[str], script=train_mopd) -> str:
    """The one line that `argv` gets."""
    with pytest.raises(SystemExit) as stopped, user_errors():
        cfg = parse(script.Config, argv)
        prepare(cfg, need_response=script is train_gkd)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


FLAGS = {
    "--learnin_rate 1": ["--learnin_rate", "--learning_rate"],
    "--loss kl": ["--loss", "kl", "reverse_kl"],
    "--support half": ["--support", "half", "teacher_topk"],
    "--tail cut": ["--tail", "cut", "bucket"],
    "--support_k 0": ["--support_k 0", "at least 1"],
    "--jsd_beta 1": ["--jsd_beta 1", "(0, 1)", "forward_kl"],
    "--estimator k1": ["--estimator k1", "reverse_kl_pg"],
    "--loss reverse_kl_pg --support full": ["--support full", "reverse_kl"],
    "--temperature 0": ["--temperature 0", "above 0"],
    "--loss reverse_kl_pg --temperature 0.7": ["--loss_temperature 1.0", "--temperature 0.7"],
    "--micro_batch_size -1": ["--micro_batch_size -1"],
    "--max_response_tokens -8": ["--max_response_tokens -8"],
    "--num_steps -1": ["--num_steps -1"],
    "--reward_weight 1": ["--reward_weight", "--num_generations"],
    "--max_response_tokens 4096": [
        "--max_prompt_tokens 16 + --max_response_tokens 4096",
        "--student_model",
        "512",
    ],
    "--data nowhere.jsonl": ["--data", "nowhere.jsonl"],
    "--domain_key topic": ["--domain_key", "topic", "data_source"],
    "--domain_weights addition=1": ["--domain_weights", "reversal"],
    "--ds_config nowhere.json": ["--ds_config nowhere.json"],
    "--reward_fn nowhere:function": ["--reward_fn nowhere:function"],
    "--reward_fn poetry=exact_match exact_match": ["--reward_fn", "poetry"],
    "--resume nowhere": ["--resume nowhere"],
    "--teacher addition=elsewhere": ["--teacher", "two teachers are called addition"],
    "--teacher third=/no/such/model": ["--teacher third", "/no/such/model"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(tiny, tmp_path, capsys, flags):
    line = mistake(capsys, [*arguments(tiny, tmp_path / "run"), *flags.split()])
    assert all(part in line for part in FLAGS[flags]), line
    assert not (tmp_path / "run").exists()


def test_no_teacher_and_a_domain_without_one(tiny, tmp_path, capsys):
    argv = arguments(tiny, tmp_path / "run")
    assert "--teacher NAME=PATH" in mistake(
        capsys, [a for a in argv if not a.startswith("--teacher")]
    )
    line = mistake(capsys, [a for a in argv if not a.startswith("--teacher=reversal")])
    assert "reversal (32 rows)" in line and "addition" in line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ('{"prompt": "a"\n', ["line 1", "not JSON"]),
        ('{"x": 1}\n', ["line 1", "data_source", "--domain_key"]),
        (
            '{"data_source": "\\ud800", "prompt": "a"}\n',
            ["line 1", "data_source", "half a surrogate"],
        ),
        (
            '{"data_source": "m", "prompt": "a", "tools": [{"name": "f"}]}\n',
            ["line 1", "leaves out the tools"],
        ),
        ("version https://git-lfs.github.com/spec/v1\n", ["git-lfs pointer", "git lfs pull"]),
    ],
)
def test_data_files(tiny, tmp_path, capsys, text, parts):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    argv = arguments(tiny, tmp_path / "run")
    argv[argv.index(str(tiny.train))] = str(path)
    line = mistake(capsys, argv)
    assert "bad.jsonl" in line and all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["not a JSON file"]),
        ('{"optimizer": {}}', ["optimizer", "--learning_rate"]),
        ('{"gradient_clipping": 1}', ["gradient_clipping", "--max_grad_norm"]),
        ('{"train_batch_size": 8}', ["train_batch_size", "--prompts_per_step"]),
        ('{"bf16": {"enabled": true}}', ["bf16", "--dtype"]),
    ],
)
def test_ds_config(tiny, tmp_path, capsys, content, parts):
    path = tmp_path / "ds.json"
    path.write_text(content)
    line = mistake(capsys, [*arguments(tiny, tmp_path / "run"), "--ds_config", str(path)])
    assert "--ds_config" in line and all(part in line for part in parts), line


def test_teachers_that_do_not_fit(tiny, tmp_path, capsys):
    """Other words, another end of a response; the latter can be allowed."""
    changed = tmp_path / "teacher"
    argv = [*arguments(tiny, tmp_path / "run"), "--dry_run"]
    argv[argv.index(f"--teacher=addition={tiny.addition}")] = f"--teacher=addition={changed}"

    shutil.copytree(tiny.addition, changed)
    words = json.loads((changed / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (changed / "tokenizer.json").write_text(json.dumps(words))
    line = mistake(capsys, argv)
    assert "--teacher addition" in line and "tokenizer is not the student's" in line

    shutil.copyfile(tiny.addition / "tokenizer.json", changed / "tokenizer.json")
    generation = json.loads((changed / "generation_config.json").read_text())
    (changed / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 7}))
    line = mistake(capsys, argv)
    assert "its EOS is" in line and line.endswith("accept it with --allow addition=eos")
    assert "its EOS is" in mistake(capsys, [*argv, "--allow", "reversal=eos", "template"])
    with pytest.raises(SystemExit) as stopped:
        prepare(parse(train_mopd.Config, [*argv, "--allow", "addition=eos"]))
    assert stopped.value.code == 0  # the dry run ends there


WEIGHTS = {
    "git-lfs pointer": (
        lambda path: (path / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        "model.safetensors is a git-lfs pointer",
    ),
    "truncated": (
        lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100),
        "is not a whole safetensors file",
    ),
    "quantised": (
        lambda path: edit_config(path, quantization_config={"quant_method": "gptq"}),
        "are quantised",
    ),
    "another shape": (
        lambda path: edit_config(path, intermediate_size=64),
        "have another shape than config.json says",
    ),
    "no class of vLLM's": (
        lambda path: edit_config(path, architectures=["Qwen3Model"]),
        "architectures ['Qwen3Model']",
    ),
}


def edit_config(path, **changes) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("who", ["student", "addition"])
def test_model_directories_that_do_not_hold_the_model(tiny, tmp_path, capsys, who, damage):
    """tests/inputs/test_weight_files.py has the whole list."""
    change, says = WEIGHTS[damage]
    path = tmp_path / "model"
    shutil.copytree(getattr(tiny, who), path)
    change(path)
    argv = [
        a.replace(str(getattr(tiny, who)), str(path)) for a in arguments(tiny, tmp_path / "run")
    ]
    line = mistake(capsys, [*argv, "--dry_run"])
    assert says in line and str(path) in line
    assert ("--student_model" if who == "student" else "--teacher addition") in line


def test_an_output_directory_that_cannot_be(tiny, capsys):
    assert "--output_dir /proc/run" in mistake(capsys, arguments(tiny, "/proc/run"))


def test_an_output_directory_of_another_run(tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    cfg = parse(train_mopd.Config, arguments(tiny, tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(
        json.dumps({**to_dict(cfg), "student_model": "another"})
    )
    line = mistake(capsys, arguments(tiny, tmp_path / "run"))
    assert "--output_dir" in line and "another run" in line


def test_what_a_resume_may_change(tiny, tmp_path):
    """Memory settings may: they are what somebody changes after running out of it.

    The held-out question may not.
    """

    def identity(*flags):
        cfg = parse(
            train_mopd.Config,
            [*arguments(tiny, tmp_path / "run"), "--eval_data", str(tiny.eval), *flags],
        )
        inputs = read_inputs(cfg, need_response=False)
        return fingerprint_of(cfg, {"addition": "a", "reversal": "r"}, "data"), asked(inputs)

    first = identity()
    memory = (
        "--rollout_kv_cache_gib",
        "0.5",
        "--teacher_kv_cache_gib",
        "0.5",
        "--loss_chunk_bytes",
        "8",
        "--enforce_eager",
    )
    assert identity(*memory) == first
    assert (
        identity("--eval_max_prompts", "2")[1] != first[1]
        and identity("--learning_rate", "1")[0] != first[0]
    )


GKD = {
    "--teacher third=elsewhere": ["train_gkd.py takes one teacher"],
    "--lmbda 1.5": ["--lmbda 1.5"],
    "--loss reverse_kl_pg": ["train_mopd.py"],
    "--lmbda 0.5": ["response"],  # the rows have no such column
}


@pytest.mark.parametrize("flags", GKD)
def test_train_gkd(tiny, tmp_path, capsys, flags):
    argv = [a for a in arguments(tiny, tmp_path / "run") if not a.startswith("--teacher=")]
    line = mistake(capsys, [*argv, f"--teacher={tiny.addition}", *flags.split()], train_gkd)
    assert all(part in line for part in GKD[flags]), line


def test_packing_on_a_model_that_mixes_rows_is_one_line(tiny, tmp_path, capsys):
    """It shows only in what the model computes, so its weights are loaded first."""
    path = tmp_path / "mamba"
    MambaForCausalLM(
        MambaConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4, initializer_range=0.3
        )
    ).save_pretrained(path)
    argv = [*arguments(tiny, tmp_path / "run"), "--packing", "--attn_implementation", "eager"]
    ready = prepare(parse(train_mopd.Config, argv))
    cfg = dataclasses.replace(
        ready.cfg, model=dataclasses.replace(ready.cfg.model, student_model=str(path))
    )
    run_of_mamba = dataclasses.replace(
        ready, cfg=cfg, ds_config={"zero_optimization": {"stage": 0}}
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        build_student(run_of_mamba)
    assert stopped.value.code == 2
    assert "error: --packing: mamba mixes sequences that lie in one row" in capsys.readouterr().err


def test_packing_that_a_machine_cannot_compute_is_one_line(tiny, tmp_path, capsys, monkeypatch):
    """A GPU whose kernels do not take the model, say."""

    def no_kernel(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, no_kernel)
    run = prepare(parse(train_mopd.Config, arguments(tiny, tmp_path / "run")))
    assert run.cfg.batch.packing, "the plan's choice"
    run = dataclasses.replace(run, ds_config={"zero_optimization": {"stage": 0}})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        build_student(run)
    assert stopped.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert "no kernel image is available" in line and "give --packing false" in line


# ---- Chat templates ------------------------------------------------------------------------------


def with_template(tiny, path, template: str) -> list[str]:
    """Arguments of a run whose student is the tiny one with another chat template."""
    shutil.copytree(tiny.student, path / "student")
    (path / "student" / "chat_template.jinja").write_text(template)
    argv = [*arguments(tiny, path / "run"), "--allow", "eos,template,rendering"]
    argv[argv.index(str(tiny.student))] = str(path / "student")
    return argv


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "refuses it: ZeroDivisionError"),
        ("{% for m in messages %}a{% endfor %}", "leaves out the text"),
    ],
)
def test_templates_that_cannot_be_used(tiny, tmp_path, capsys, template, said):
    line = mistake(capsys, with_template(tiny, tmp_path, template))
    assert f"--data {tiny.train}, line 1: column `prompt`: the chat template {said}" in line


def test_dataset_responses_end_as_the_template_ends_a_turn(tiny, tmp_path, tokenizer):
    """Both tokens end the student's responses; the tokenizer's EOS is the other one."""
    letter = tokenizer.convert_tokens_to_ids("z")
    argv = with_template(tiny, tmp_path, "{% for m in messages %}{{ m.content }}z{% endfor %}")
    generation = tmp_path / "student" / "generation_config.json"
    generation.write_text(
        json.dumps(
            json.loads(generation.read_text()) | {"eos_token_id": [tokenizer.eos_token_id, letter]}
        )
    )
    rows = [json.loads(line) | {"response": "ab"} for line in tiny.train.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv[argv.index(str(tiny.train))] = str(tmp_path / "rows.jsonl")
    argv = [*(a for a in argv if not a.startswith("--teacher=")), f"--teacher={tiny.addition}"]
    ready = prepare(parse(train_gkd.Config, argv), need_response=True)
    assert {tuple(p.target_ids) for p in ready.train_set.prompts} == {
        tuple(tokenizer.convert_tokens_to_ids([*"abz"]))
    }


def test_a_run_whose_template_writes_the_date_goes_on_another_day(tiny, tmp_path, monkeypatch):
    """The first start decides: neither the prompts nor their hash change with the day."""

    def start(moment: datetime, *flags):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls: moment)})
        monkeypatch.setattr(checkpoint, "datetime", clock)
        return prepare(parse(train_mopd.Config, [*argv, *flags]))

    argv = with_template(
        tiny,
        tmp_path,
        "{{ strftime_now('%d%m%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    first = start(datetime(2026, 2, 28, 23, 59, 59, 5))
    assert first.fingerprint["first_start"] == "2026-02-28T23:59:59"
    state = LoopState(step=1)
    checkpoint.save(
        first.run_dir,
        state,
        lambda path: (path / "shard").write_bytes(b"s"),
        first.fingerprint,
        keep=1,
    )
    for flags in ((), ("--resume", str(first.run_dir / "checkpoints" / "step_1"))):
        again = start(datetime(2026, 3, 1), *flags)
        assert again.resume_from.name == "step_1" and again.fingerprint == first.fingerprint
        assert again.train_set.prompts == first.train_set.prompts
    other = start(datetime(2026, 3, 1), "--output_dir", str(tmp_path / "other"))
    assert other.train_set.prompts != first.train_set.prompts


def test_what_changes_prompts_or_samples_is_another_run(tiny, tmp_path):
    """By the content of the prompts, and by the ids at which responses end."""
    argv = with_template(
        tiny, tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}{{ k }}"
    )
    first = prepare(parse(train_mopd.Config, argv))
    checkpoint.save(
        first.run_dir,
        LoopState(step=1),
        lambda path: (path / "shard").write_bytes(b"s"),
        first.fingerprint,
        keep=1,
    )
    for flags, name in (
        (("--chat_template_kwargs", '{"k": "z"}'), "data"),
        (("--system_prompt", "zz"), "data"),
        (("--stop_token_ids", "z"), "stop_token_ids"),
    ):
        with pytest.raises(ValueError, match=f"--resume: `{name}`.* differs from the checkpoint"):
            prepare(parse(train_mopd.Config, [*argv, *flags]))
    neutral = ("--chat_template_kwargs", '{"other": 1}', "--allow", "eos,template,rendering")
    assert prepare(parse(train_mopd.Config, [*argv, *neutral])).fingerprint == first.fingerprint


def test_teachers_are_tried_on_the_run_s_own_prompts(tiny, tmp_path, capsys):
    """Another program that writes the same is the same; a mode that it does not know is not."""
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    hybrid = plain + "{% if quiet %}z{% endif %}"
    argv = [a for a in with_template(tiny, tmp_path, hybrid) if not a.startswith("--teacher=")]
    place = argv.index("--allow")
    del argv[place : place + 2]
    for name, path in (("addition", tiny.addition), ("reversal", tiny.reversal)):
        shutil.copytree(path, tmp_path / name)
        template = plain if name == "addition" else hybrid
        (tmp_path / name / "chat_template.jinja").write_text(template)
        argv.append(f"--teacher={name}={tmp_path / name}")
    ready = prepare(parse(train_mopd.Config, argv))
    assert len(ready.facts.dialects) == 2 and not ready.unshared
    quiet = ["--chat_template_kwargs", 'addition={"quiet": true}', "--output_dir", str(tmp_path)]
    line = mistake(capsys, [*argv, *quiet])
    assert "--teacher addition" in line and "in another way" in line
    assert line.endswith("--allow addition=rendering")
    quiet[1] = 'reversal={"quiet": true}'  # the domain of the teacher that knows it
    prepare(parse(train_mopd.Config, [*argv, *quiet]))


@pytest.mark.parametrize(
    "flags", [("--system_prompt", "poetry=rhyme"), ("--chat_template_kwargs", 'poetry={"a": 1}')]
)
def test_flags_for_a_domain_that_no_row_has(tiny, tmp_path, capsys, flags):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    line = mistake(capsys, [*with_template(tiny, tmp_path, template), *flags])
    assert f"{flags[0]} poetry=...: the data has no domain poetry" in line
