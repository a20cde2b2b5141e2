"""Flags, YAML files and what is wrong with them."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import yaml

import train_mopd
from opd.config import (
    BatchConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TeacherSpec,
)
from opd.inputs.arguments import pairs, parse
from opd.inputs.validation import load_ds_config, validate_common
from opd.lora_config import LoraConfig
from opd.options import groups_of, to_dict
from opd.privilege import PrivilegeConfig


@dataclass(frozen=True)
class Config:
    """All groups; a script adds its own."""

    model: ModelConfig
    teacher: TeacherConfig
    privilege: PrivilegeConfig
    data: DataConfig
    rollout: RolloutConfig
    loss: LossConfig
    batch: BatchConfig
    optim: OptimConfig
    lora: LoraConfig
    run: RunConfig
    teachers: tuple[TeacherSpec, ...] = ()


def words(text: str) -> list[str]:
    return text.split()


REQUIRED = ["--student_model", "s", "--data", "d.jsonl", "--output_dir", "o", "--teacher", "t"]


def flags_of(config_class) -> list[str]:
    return [f.name for group in groups_of(config_class).values() for f in dataclasses.fields(group)]


def write_yaml(path, content) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def validated(*argv: str) -> Config:
    config = parse(Config, [*REQUIRED, *argv])
    validate_common(config)
    return config


def error(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message, message
    return message


def test_every_flag_has_help():
    for group in groups_of(Config).values():
        for field in dataclasses.fields(group):
            assert len(field.metadata.get("help", "")) > 10, field.name


def test_defaults_are_valid_and_flags_become_values():
    config = validated(
        "--learning_rate",
        "1e-3",
        "--num-steps",
        "7",
        "--dry_run",
        "--jsd_beta=0.25",
        "--eval_data",
        "a",
        "b",
    )
    assert (config.optim.learning_rate, config.run.num_steps, config.run.dry_run) == (1e-3, 7, True)
    assert config.loss.jsd_beta == 0.25 and config.data.eval_data == ["a", "b"]
    assert config.loss.clip_low is None and config.run.seed == 0


def test_the_command_line_wins_over_yaml(tmp_path):
    path = write_yaml(
        tmp_path / "c.yaml",
        "seed: 3\nlearning_rate: 1e-4\ndata: [x, y]\ngradient_checkpointing: "
        "true\nadvantage_clip: null\n"
        "teachers: [{name: math, model: m}]\n",
    )
    config = parse(Config, ["--config", path, "--seed", "5"])
    assert (config.run.seed, config.optim.learning_rate, config.data.data) == (5, 1e-4, ["x", "y"])
    assert config.model.gradient_checkpointing and config.loss.advantage_clip is None
    config = parse(
        Config,
        [f"--config={path}", "--data", "z", "--gradient_checkpointing", "false", "--teacher", "t"],
    )
    assert (
        config.data.data == ["z"]
        and not config.model.gradient_checkpointing
        and config.run.seed == 3
    )
    assert config.teachers == (TeacherSpec("default", "t", "*"),)


def test_yaml_maps_become_pairs(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", {"domain_weights": {"math": 2, "code": 0.5}})
    weights = parse(Config, ["--config", path]).data.domain_weights
    assert pairs("domain_weights", weights) == {"math": 2.0, "code": 0.5}


@pytest.mark.parametrize("value", ["math", "math=x", "=1", "math=-1", "math=nan", "math=inf"])
def test_pairs_that_are_not(value):
    assert f"--domain_weights {value}" in error(pairs, "domain_weights", [value])


def test_a_domain_with_two_weights():
    assert "math" in error(pairs, "domain_weights", ["math=1", "math=2"])


def test_teachers_from_flags():
    config = parse(Config, ["--teacher", "math=a/b", "--teacher", "code=c=d", "--teacher", "rest"])
    assert config.teachers == (
        TeacherSpec("math", "a/b", ("math",)),
        TeacherSpec("code", "c=d", ("code",)),
        TeacherSpec("default", "rest", "*"),
    )
    for value in ("=path", "name="):
        assert f"--teacher {value}" in error(parse, Config, ["--teacher", value])


def test_teachers_from_yaml(tmp_path):
    entries = [
        {"name": "a", "model": "m/a"},
        {"name": "b", "model": "m/b", "domains": ["x", 7], "weight": 3},
        {"name": "c", "model": "m/c", "domains": "*"},
    ]
    config = parse(Config, ["--config", write_yaml(tmp_path / "c.yaml", {"teachers": entries})])
    assert config.teachers == (
        TeacherSpec("a", "m/a", ("a",)),
        TeacherSpec("b", "m/b", ("x", "7"), 3.0),
        TeacherSpec("c", "m/c", "*"),
    )


BAD_TEACHERS = {
    "must be a list": "math",
    "needs at least `name` and `model`": [{"name": "a"}],
    "unknown key `domain`; did you mean domains?": [{"name": "a", "model": "m", "domain": ["x"]}],
    "domains must be a list": [{"name": "a", "model": "m", "domains": "math"}],
    "weight must be a number": [{"name": "a", "model": "m", "weight": "big"}],
    "a: backend must be vllm, hf or server, got 'vlm'; did you mean vllm?": [
        {"name": "a", "model": "m", "backend": "vlm"}
    ],
    "a: backend must be vllm, hf or server, got 'HFF'; did you mean hf?": [
        {"name": "a", "model": "m", "backend": "HFF"}
    ],
    "a: backend must be vllm, hf or server, got 7": [{"name": "a", "model": "m", "backend": 7}],
    "a: allow must be a list of eos, template, rendering, got ['eso']": [
        {"name": "a", "model": "m", "allow": ["eso"]}
    ],
    "a: urls must be a list": [{"name": "a", "backend": "server", "urls": "http://h"}],
    "`api_key`: no secret may stand in a file": [
        {"name": "a", "backend": "server", "api_key": "hush"}
    ],
    "`Token`: no secret may stand in a file": [{"name": "a", "model": "m", "Token": "hush"}],
}


@pytest.mark.parametrize("message", BAD_TEACHERS)
def test_bad_teachers_in_yaml(tmp_path, message):
    path = write_yaml(tmp_path / "c.yaml", {"teachers": BAD_TEACHERS[message]})
    found = error(parse, Config, ["--config", path])
    assert message in found and "c.yaml" in found and "hush" not in found


def test_backends_of_teachers(tmp_path):
    """An entry's own, else that of the flag, wherever the flag stands; the run directory's file
    says it in full.
    """
    entries = [{"name": "a", "model": "m"}, {"name": "b", "model": "m", "backend": "vllm"}]
    path = write_yaml(tmp_path / "c.yaml", {"teachers": entries, "teacher_backend": "hf"})
    config = parse(Config, [*REQUIRED[:-2], "--config", path])
    assert [spec.backend for spec in config.teachers] == ["hf", "vllm"]
    again = parse(
        Config,
        ["--config", write_yaml(tmp_path / "d.yaml", to_dict(config)), "--teacher_backend", "vllm"],
    )
    assert again.teachers == config.teachers
    assert [
        spec.backend
        for spec in parse(Config, ["--config", path, "--teacher_backend", "vllm"]).teachers
    ] == ["vllm"] * 2
    flags = ["--teacher", "a=m", "--teacher", "rest", "--teacher_backend=hf"]
    assert [spec.backend for spec in parse(Config, flags).teachers] == ["hf", "hf"]
    assert [spec.backend for spec in validated().teachers] == ["vllm"]
    assert validated().teacher.teacher_residency == "host"


def test_teacher_and_teachers_in_one_file(tmp_path):
    path = write_yaml(
        tmp_path / "c.yaml", {"teachers": [{"name": "a", "model": "m"}], "teacher": ["b=n"]}
    )
    assert "both `teacher` and `teachers`" in error(parse, Config, ["--config", path])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no teacher: give --teacher"),
        (["math=a", "math=b"], "two teachers are called math"),
        (["a", "b"], "two teachers are called default"),
    ],
)
def test_teachers_that_do_not_go_together(specs, message):
    argv = [
        "--student_model",
        "s",
        "--data",
        "d",
        "--output_dir",
        "o",
        *(x for s in specs for x in ("--teacher", s)),
    ]
    assert message in error(validate_common, parse(Config, argv))


def test_only_one_teacher_takes_the_rest():
    assert "the domain * is claimed by a and b without weights" in refused(
        TeacherSpec("a", "m", "*"), TeacherSpec("b", "m", "*")
    )
    for weight in (-1.0, float("inf"), float("nan")):
        assert f"a: weight {weight}: must be finite and at least 0" in refused(
            TeacherSpec("a", "m", "*", weight)
        )


# ---- Served teachers and mixtures ----------------------------------------------------------------

A, B = "http://127.0.0.1:8000", "http://127.0.0.1:8001"


def refused(*specs: TeacherSpec, argv: str = "") -> str:
    return error(
        validate_common,
        dataclasses.replace(parse(Config, [*REQUIRED, *words(argv)]), teachers=specs),
    )


def served(name: str, *urls: str, model: str = "", **more) -> TeacherSpec:
    return TeacherSpec(name, model, (name,), backend="server", urls=urls, **more)


def test_urls_on_the_command_line():
    config = parse(
        Config,
        ["--teacher", f"math=HTTP://LocalHost:8000/v1/,{B}", "--teacher", "https://far.org/Q=3/"],
    )
    assert config.teachers == (
        served("math", "http://localhost:8000", B),
        TeacherSpec("default", "", "*", backend="server", urls=("https://far.org/Q=3",)),
    )
    assert all(spec.is_served for spec in config.teachers) and not validated().teachers[0].is_served


def test_a_served_teacher_in_yaml_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "hush")
    entries = [
        {
            "name": "math",
            "backend": "server",
            "urls": [A + "/", B],
            "api_key_env": "TEACHER_KEY",
            "weight": 1,
        },
        {
            "name": "code",
            "model": "big",
            "backend": "server",
            "urls": [A],
            "domains": ["code", "math"],
            "weight": 0.5,
        },
        {"name": "rest", "model": "m", "domains": "*", "weight": None},
    ]
    flags = {
        "teacher_mode": "standalone",
        "teacher_wait_s": 5,
        "teacher_timeout_s": 2.5,
        "teacher_max_inflight": 4,
    }
    path = write_yaml(tmp_path / "c.yaml", {"teachers": entries, **flags})
    config = parse(Config, [*REQUIRED[:-2], "--config", path])
    validate_common(config)
    assert config.teachers[0] == served("math", A, B, weight=1.0, api_key_env="TEACHER_KEY")
    assert [spec.share for spec in config.teachers] == [1.0, 0.5, 1.0] and config.teachers[
        2
    ].weight is None
    again = parse(Config, ["--config", write_yaml(tmp_path / "d.yaml", to_dict(config))])
    assert again == config and "hush" not in (tmp_path / "d.yaml").read_text()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([served("a")], "teachers: a: no replicas; give `urls`"),
        (
            [TeacherSpec("a", "m", "*", urls=(A,))],
            "teachers: a: urls given for backend vllm; set `backend: server`",
        ),
        (
            [TeacherSpec("a", "m", "*", backend="hf", api_key_env="K")],
            "teachers: a: api_key_env given for backend hf",
        ),
        ([served("a", A, B, A)], f"teachers: a: duplicate URL {A}; list each replica once"),
        (
            [served("a", A), served("b", B, A)],
            f"teachers: b: duplicate URL {A}, teacher a has it too; give each its own",
        ),
        (
            [served("a", "ftp://h:1")],
            "teachers: a: urls[0] 'ftp://h:1': not an http(s) URL; write http://HOST:PORT",
        ),
        ([served("a", A, "")], "teachers: a: urls[1] '': not an http(s) URL"),
        ([served("a", "http://")], "not an http(s) URL"),
        ([served("a", "http://h:port")], "not an http(s) URL"),
        ([served("a", "http://[h")], "not an http(s) URL"),
        ([served("a", "http://h 1:80")], "not an http(s) URL"),
        (
            [served("a", "http://me:hush@h:1")],
            "teachers: a: urls[0]: user info in a URL; put the key into an environment",
        ),
        (
            [served("a", A + "?key=hush")],
            f"urls[0] '{A}': a query or fragment does not belong to a server's address",
        ),
        ([served("a", A + "#hush")], "a query or fragment does not belong"),
        (
            [served("a", A, tensor_parallel_size=2)],
            "a: tensor_parallel_size 2: backend server cannot split a model here",
        ),
        (
            [served("a", A, api_key_env="UNSET_KEY")],
            "a: api_key_env UNSET_KEY: this variable is not set; export it",
        ),
        (
            [served("a", A, api_key_env="sk-hush")],
            "a: api_key_env must be the NAME of an environment variable",
        ),
        ([served("a", A, weight=float("nan"))], "a: weight nan: must be finite and at least 0"),
    ],
)
def test_served_teachers_that_cannot_be(specs, message, monkeypatch):
    monkeypatch.delenv("UNSET_KEY", raising=False)
    found = refused(*specs)
    assert message in found and "hush" not in found


def test_one_server_may_serve_two_teachers_by_their_models():
    def both(*models: str):
        return [served(name, A, model=model) for name, model in zip("ab", models, strict=True)]

    assert "duplicate URL" in refused(*both("one", "one"))
    # raises nothing
    validate_common(dataclasses.replace(validated(), teachers=tuple(both("one", "two"))))


def test_standalone_needs_a_served_teacher():
    assert "--teacher_mode standalone: no teacher is served" in refused(
        TeacherSpec("a", "m", "*"), argv="--teacher_mode standalone"
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            (None, None),
            "the domain x is claimed by a and b without weights; give each a `weight`, or x to one",
        ),
        ((1.0, None), "the domain x is claimed by a and b without weights"),
        (
            (0.0, 0.0),
            "the weights of the domain x sum to 0 (a and b); give one of them a weight above 0",
        ),
        ((1.0, -0.5), "b: weight -0.5: must be finite and at least 0"),
        ((0.0, 2.0), None),
    ],
)
def test_two_teachers_of_one_domain(weights, message):
    specs = [TeacherSpec(n, "m", ("x",), weight) for n, weight in zip("ab", weights, strict=True)]
    if message is None:
        validate_common(dataclasses.replace(validated(), teachers=tuple(specs)))
    else:
        assert message in refused(*specs)
    assert "sum to 0 (a)" in refused(TeacherSpec("a", "m", "*", 0.0))


@pytest.mark.parametrize("missing", ["student_model", "data", "output_dir"])
def test_required_flags(missing):
    position = REQUIRED.index(f"--{missing}")
    argv = REQUIRED[:position] + REQUIRED[position + 2 :]
    assert f"--{missing} is required" in error(validate_common, parse(Config, argv))


BAD_FLAGS = {
    "--learningrate 1": ["--learningrate", "--learning_rate"],
    "--suport full": ["--suport", "--support"],
    "--nonsense 1": ["--nonsense"],
    "--loss kl": ["--loss", "'kl'", "reverse_kl_pg"],
    "--support some": ["--support", "'some'", "teacher_topk"],
    "--tail none": ["--tail", "'none'", "bucket"],
    "--estimator k4": ["--estimator", "'k4'"],
    "--teacher_backend sglang": ["--teacher_backend", "'sglang'", "vllm", "hf"],
    "--teacher_backend server": ["--teacher_backend", "'server'", "vllm", "hf"],
    "--teacher_mode stream": ["--teacher_mode", "'stream'", "standalone"],
    "--teacher_residency disc": ["--teacher_residency", "'disc'", "disk"],
    "--seed one": ["--seed", "'one'"],
    "--learning_rate fast": ["--learning_rate", "'fast'"],
    "--dry_run perhaps": ["--dry_run", "perhaps"],
    "--num_steps": ["--num_steps", "expected one argument"],
    "--num_steps 1.5": ["--num_steps", "'1.5'"],
    "--config": ["--config", "expected one argument"],
    "--seed 1 stray": ["stray"],
    "--weight_transfer broadcast": [
        "unknown flag --weight_transfer; it was removed",
        "--weights_dir",
    ],
    "--allow_template_mismatch": [
        "unknown flag --allow_template_mismatch; it was removed",
        "--allow eos,template,rendering",
    ],
    "--weight-transfer=directory": [
        "unknown flag --weight_transfer; it was removed",
        "--weights_dir",
    ],
}


@pytest.mark.parametrize("argv", BAD_FLAGS)
def test_bad_flags(argv):
    message = error(parse, Config, [*REQUIRED, *words(argv)])
    for part in BAD_FLAGS[argv]:
        assert part in message, message


BAD_YAML = {
    "learning_rat: 1": ["unknown key `learning_rat`", "did you mean learning_rate?"],
    "weight_transfer: directory": [
        "unknown key `weight_transfer`; it was removed",
        "--weights_dir",
    ],
    "allow_template_mismatch: true": ["`allow_template_mismatch`; it was removed", "--allow eos"],
    "teacherz: [a]": ["unknown key `teacherz`", "did you mean teacher"],
    "3: 4": ["unknown key `3`"],
    "- a\n- b": ["expected `flag: value` lines"],
    "a: [1": ["not a YAML file"],
    "seed: one": ["--seed", "'one'"],
    "loss: {a: 1}": ["--loss"],
    "api_key: hush": ["c.yaml", "`api_key`: no secret may stand in a file", "`api_key_env`"],
    "token: hush": ["c.yaml", "`token`: no secret may stand in a file", "`api_key_env`"],
}


@pytest.mark.parametrize("content", BAD_YAML)
def test_bad_yaml(tmp_path, content):
    message = error(parse, Config, ["--config", write_yaml(tmp_path / "c.yaml", content)])
    for part in BAD_YAML[content]:
        assert part in message, message
    assert "hush" not in message.replace(str(tmp_path), "")


def test_missing_yaml(tmp_path):
    assert "no such file" in error(parse, Config, ["--config", str(tmp_path / "no.yaml")])
    assert "c.yaml" in error(
        parse, Config, ["--config", write_yaml(tmp_path / "c.yaml", "") + "/x"]
    )


BAD_VALUES = [
    ("--support_k 0", "--support_k 0: must be at least 1"),
    ("--jsd_beta 0", "--jsd_beta 0.0: must lie inside (0, 1); for the limits"),
    ("--jsd_beta 1", "--jsd_beta 1.0"),
    ("--jsd_beta nan", "--jsd_beta nan: must be finite"),
    ("--skew_alpha 1", "--skew_alpha 1.0: must lie inside"),
    ("--estimator k1", "--estimator k1"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--temperature -1", "--temperature -1.0"),
    ("--temperature inf", "--temperature inf: must be finite"),
    ("--loss_temperature 0", "--loss_temperature 0.0"),
    ("--top_p 0", "--top_p 0.0"),
    ("--top_p 1.5", "--top_p 1.5: must be at most 1"),
    ("--adam_beta1 1", "--adam_beta1 1.0"),
    ("--domain_weights math", "--domain_weights math"),
    ("--allow eso", "--allow eso: 'eso' is none of eos, template, rendering"),
    ("--allow math=eos", "--allow math=eos: no teacher is called 'math', only default"),
    ("--allow =eos", "--allow =eos: no teacher is called ''"),
    ("--allow default=eos,", "--allow default=eos,: '' is none of eos"),
    ("--chat_template_kwargs a=b", "--chat_template_kwargs 'a=b': not JSON"),
    ("--chat_template_kwargs [1]", "--chat_template_kwargs '[1]': not a JSON object"),
    ("--chat_template_kwargs a=[1]", "--chat_template_kwargs 'a=[1]': not a JSON object"),
    ("--chat_template_kwargs {} {}", "--chat_template_kwargs: given twice for every domain"),
    ("--system_prompt a=b a=c", "--system_prompt: given twice for the domain a"),
    ("--system_prompt Be brief.", "--system_prompt: given twice for every domain; quote"),
    ("--support sampled --loss jsd", "--support sampled: jsd"),
    ("--loss reverse_kl_pg --support full", "--support full: reverse_kl_pg"),
    ("--loss reverse_kl_pg --estimator k3", "--estimator k3: reverse_kl_pg"),
    ("--loss reverse_kl_pg --loss_temperature 2", "--temperature 1.0"),
    ("--clip_low 0.2", "--clip_low 0.2: only a policy gradient clips"),
    ("--loss reverse_kl_pg --clip_high 0.2", "--clip_high: needs --clip_low"),
    ("--loss reverse_kl_pg --dual_clip 3", "--dual_clip 3.0"),
    ("--loss reverse_kl_pg --clip_low 1.5", "--clip_low 1.5: must be below 1"),
    ("--loss reverse_kl_pg --clip_low 0.2 --dual_clip 1", "--dual_clip 1.0: must be above 1"),
    ("--is_low 3 --is_high 2", "--is_low 3.0"),
    ("--reward_weight 0.5", "--num_generations"),
    (
        "--max_tokens_per_micro_batch 100",
        "--max_tokens_per_micro_batch 100: one sequence can have 2047 tokens",
    ),
    (
        "--inner_updates 2 --loss reverse_kl_pg",
        "--inner_updates 2: after the first, a policy gradient is off-policy",
    ),
    (
        "--inner_updates 2 --reward_weight 1 --num_generations 2",
        "--inner_updates 2: after the first",
    ),
    (
        "--inner_updates 2 --loss reverse_kl_pg --clip_low 0.2 --is_mode mask",
        "--inner_updates 2: --clip_low and --is_mode",
    ),
    (
        "--inner_updates 2 --loss reverse_kl_pg --is_mode mask --old_logprobs recompute",
        "--inner_updates 2: with --old_logprobs recompute --is_mode does not see",
    ),
    (
        "--inner_updates 2 --loss reverse_kl_pg --reject_level sequence",
        "--inner_updates 2: after the first",
    ),
    ("--old_logprobs recompute", "--old_logprobs recompute: nothing reads them"),
    (
        "--old_logprobs server --is_mode mask",
        "--old_logprobs server: log-prob servers get the weights of --mode async",
    ),
    (
        "--reject_level geometric --reject_low 1.1 --reject_high 2",
        "--reject_low 1.1: must be at most 1",
    ),
    ("--reject_level geometric --reject_high 0.9", "--reject_high 0.9: must be at least 1"),
    ("--time_limit 0", "--time_limit 0.0: must be above 0"),
    ("--allow_change learning_rate,lrr", "--allow_change lrr: no such flag"),
    *(
        (f"--{name} -1", f"--{name} -1")
        for name in words(
            "prompts_per_step num_generations max_prompt_tokens max_response_tokens "
            "micro_batch_size keep_checkpoints loss_chunk_bytes inner_updates overlap_k "
            "max_tokens_per_micro_batch teacher_cache_bytes teacher_wait_s teacher_timeout_s "
            "teacher_max_inflight num_steps seed eval_every save_every parity_every "
            "eval_max_prompts rollout_every rollout_samples warmup_steps learning_rate "
            "weight_decay max_grad_norm min_lr_ratio top_k reward_weight rollout_kv_cache_gib "
            "teacher_kv_cache_gib advantage_clip clip_low clip_high is_low is_high adam_eps "
            "reject_low reject_high adam_beta1 adam_beta2"
        )
    ),
    *(
        (f"--{n} 0", f"--{n} 0")
        for n in words("prompts_per_step num_generations max_response_tokens micro_batch_size")
    ),
]


@pytest.mark.parametrize(
    ("flag", "value", "kind"),
    [
        ("save_every", "often", "whole number"),
        ("save_every", "2.5", "whole number"),
        ("rollout_kv_cache_gib", "much", "number"),
    ],
)
def test_what_is_neither_a_number_nor_auto(flag, value, kind):
    message = error(parse, Config, [*REQUIRED, f"--{flag}", value])
    assert message == f"--{flag}: invalid {kind} or auto value: {value!r}"


@pytest.mark.parametrize(("argv", "message"), BAD_VALUES)
def test_bad_values(argv, message):
    config = parse(Config, [*REQUIRED, *words(argv)])
    assert message in error(validate_common, config)


@pytest.mark.parametrize(
    "argv",
    [
        "--loss reverse_kl_pg --clip_low 0.2 --clip_high 0.3 --dual_clip 3 --advantage_clip 5",
        "--loss reverse_kl_pg --temperature 0.7 --loss_temperature 0.7",
        "--loss jsd --jsd_beta 0.9 --support teacher_topk --support_k 1 --tail generalized",
        "--support sampled --estimator k2",
        "--reward_weight 0.5 --num_generations 2 --clip_low 0.2",
        "--loss reverse_kl_pg --old_logprobs recompute --clip_low 0.2 --is_mode truncate "
        "--inner_updates 2",
        "--loss reverse_kl_pg --clip_low 0.2 --inner_updates 2 --reject_level sequence",
        "--loss jsd --old_logprobs recompute --is_mode mask --reject_level geometric "
        "--inner_updates 3",
    ],
)
def test_good_values(argv):
    assert to_dict(validated(*words(argv))) == to_dict(parse(Config, [*REQUIRED, *words(argv)])), (
        "a check changes nothing"
    )


BAD_AHEAD = {
    "--sync_every 2 --eval_every 3": "--eval_every 3: the servers that are evaluated get weights "
                                     "every --sync_every 2",
    "--rollout_servers ftp://a": "--rollout_servers ftp://a: not an http(s) URL",
    "--rollout_servers http://a:99999 --weights_dir w": "--rollout_servers http://a:99999: not an "
                                                        "http(s) URL",
    "--rollout_servers http://a:1": "--weights_dir is required with servers of your own",
    "--logprob_servers http://a:1 --old_logprobs server --is_mode mask": "--weights_dir is "
                                                                         "required with servers "
                                                                         "of your own",
    "--loss reverse_kl_pg --is_mode truncate --old_logprobs server --logprob_servers auto":
        "--max_staleness 1: with --old_logprobs server --is_mode does not see",
    "--loss reverse_kl_pg --is_mode truncate --clip_low 0.2": "--max_staleness 1: --clip_low and "
                                                              "--is_mode would both weigh",
    "--max_staleness 0 --sync_every 2": "--max_staleness 0: with --sync_every 2 the step before a "
                                        "push is 1",
    "--rollout_servers auto http://a:1": "--rollout_servers: auto stands alone",
    "--weights_dir w --rollout_servers http://a:1 http://A:1/": "--rollout_servers http://a:1: it "
                                                                "stands there twice",
    "--loss reverse_kl_pg": "--max_staleness 1: a policy gradient on stale responses",
    "--reward_weight 1 --num_generations 2": "--max_staleness 1: a policy gradient on stale "
                                             "responses",
    "--logprob_servers auto": "--old_logprobs server and --logprob_servers need each other",
    "--old_logprobs server --is_mode mask": "--old_logprobs server and --logprob_servers need "
                                            "each other",
    "--weights_dir w --old_logprobs server --is_mode mask --rollout_servers http://a:1 "
    "--logprob_servers http://a:1":
        "--logprob_servers http://a:1: it is also one of --rollout_servers",
    "--rollout_gpus 1 --rollout_replicas 2": "--rollout_gpus 1: 2 GPUs are needed, each named once",
    "--rollout_gpus 1,1 --rollout_replicas 2": "--rollout_gpus 1,1: 2 GPUs are needed",
    "--rollout_gpus 1 --rollout_tensor_parallel_size 2": "--rollout_gpus 1: 2 GPUs are needed",
    "--weights_dir w --rollout_gpus 1 --rollout_servers http://a:1": "--rollout_gpus 1: only for "
                                                                     "servers that are started "
                                                                     "here",
    "--logprob_gpus 1": "--logprob_gpus 1: only for servers that are started here",
    "--sync_every 0": "--sync_every 0: must be at least 1",
    "--rollout_replicas 0": "--rollout_replicas 0: must be at least 1",
    "--logprob_replicas 0": "--logprob_replicas 0: must be at least 1",
    "--rollout_wait_s 0": "--rollout_wait_s 0.0: must be above 0",
}  # fmt: skip


@pytest.mark.parametrize("argv", BAD_AHEAD)
def test_what_the_asynchronous_mode_refuses(argv):
    config = parse(train_mopd.Config, [*REQUIRED, "--mode", "async", *words(argv)])
    assert BAD_AHEAD[argv] in error(config.validate)


@pytest.mark.parametrize(
    "argv",
    [
        "--loss reverse_kl_pg --is_mode truncate --clip_low 0.2 --old_logprobs server "
        "--logprob_servers auto --logprob_gpus 3",
        "--loss reverse_kl_pg --is_mode truncate --old_logprobs recompute",
        "--old_logprobs server --logprob_servers auto",  # measured only
        "--rollout_servers http://a:1 --weights_dir w --sync_every 2 --eval_every 4",
        "--loss reverse_kl_pg --max_staleness 0",
        "--rollout_gpus 4,5,6,7 --rollout_replicas 2 --rollout_tensor_parallel_size 2 "
        "--max_staleness 3 --sync_every 4",
    ],
)
def test_what_the_asynchronous_mode_takes(argv):
    arguments = [*REQUIRED, "--mode", "async", *words(argv)]
    config = parse(train_mopd.Config, arguments)
    config.validate()
    assert to_dict(config) == to_dict(parse(train_mopd.Config, arguments)), (
        "a check changes nothing"
    )


def test_round_trip_through_yaml(tmp_path):
    config = validated(
        *words(
            "--teacher math=m --domain_weights math=1 default=2 --adam_eps 1e-9 --eval_data e "
            "--dry_run"
        ),
        *words(
            "--loss reverse_kl_pg --clip_low 0.2 --temperature 0.7 --loss_temperature 0.7 "
            "--trust_remote_code"
        ),
    )
    path = write_yaml(tmp_path / "c.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    again = parse(Config, ["--config", path])
    assert to_dict(again) == to_dict(config) and again.teachers == config.teachers
    assert again.optim == config.optim and again.data == config.data and again.loss == config.loss
    assert set(to_dict(config)) == set(flags_of(Config)) - {"teacher"} | {"teachers"}


def write_json(tmp_path, content) -> str:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_ds_config(tmp_path):
    content = {"zero_optimization": {"stage": 3}, "communication_data_type": "fp32"}
    assert load_ds_config(write_json(tmp_path, content)) == content
    assert load_ds_config(write_json(tmp_path, {})) == {}


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("train_batch_size", "--prompts_per_step"),
        ("train_micro_batch_size_per_gpu", "--micro_batch_size"),
        ("gradient_accumulation_steps", "--micro_batch_size"),
        ("gradient_clipping", "--max_grad_norm"),
        ("optimizer", "--learning_rate"),
        ("scheduler", "--lr_schedule"),
        ("fp16", "--dtype"),
        ("bf16", "--dtype"),
        ("bfloat16", "--dtype"),
        ("amp", "--dtype"),
        ("torch_autocast", "--dtype"),
    ],
)
def test_ds_config_leaves_the_algorithm_to_flags(tmp_path, key, flag):
    message = error(load_ds_config, write_json(tmp_path, {key: "auto"}))
    assert f"`{key}`" in message and flag in message and "ds.json" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": ', "not a JSON file"),
        ("[]", "expected a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": 3}, "stage must be 0, 1, 2 or 3"),
    ],
)
def test_broken_ds_config(tmp_path, content, message):
    assert message in error(load_ds_config, write_json(tmp_path, content))


def test_missing_ds_config(tmp_path):
    assert "no such file" in error(load_ds_config, str(tmp_path / "no.json"))
    assert "--ds_config" in error(load_ds_config, str(tmp_path))
