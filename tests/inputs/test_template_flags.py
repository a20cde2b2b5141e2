"""Variables of the chat template and a system message, given by flags: for all rows, or for those
of a domain.
"""

import json

import pytest
import yaml

import train_mopd
from opd.config import DataConfig
from opd.inputs.arguments import parse
from opd.inputs.prompts import load_prompts
from opd.inputs.template_flags import read_template_flags
from opd.options import to_dict
from tests.inputs.test_templates import make_tokenizer

# As hybrid models do: whoever shall not think finds the thinking done.
HYBRID = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking "
    "%}(){% endif %}{{ effort }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + HYBRID
)
SILENT = "{% for m in messages if m.role != 'system' %}<user>{{ m.content }}{% endfor %}<assistant>"
QUIET = '{"enable_thinking": false}'


@pytest.fixture
def texts(tmp_path):
    """What rows become, by the flags of a command line or a YAML file."""

    def texts(rows, *argv: str, template=HYBRID, content: dict | None = None) -> list[str]:
        path, file = tmp_path / "rows.jsonl", tmp_path / "c.yaml"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.write_text(yaml.safe_dump(content or {}))
        config = parse(train_mopd.Config, ["--config", str(file), *argv]).data
        tokenizer = make_tokenizer(template)
        found = load_prompts([str(path)], tokenizer, config, flag="--data")
        texts.prompt_set = found
        return ["".join(tokenizer.convert_ids_to_tokens(p.token_ids)) for p in found.prompts]

    return texts


def row(domain: str, **more) -> dict:
    return {"data_source": domain, "prompt": "hi", **more}


def line_of(call, *args, **options) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message and "\n" not in message, message
    return message


ASKED, DONE = "<user>hi<|end|><assistant>", "<user>hi<|end|><assistant>()"


def test_a_variable_for_all_rows_is_taken_back_for_a_domain_and_by_a_row(texts):
    rows = [
        row("code"),
        row("math"),
        row("math", chat_template_kwargs=json.loads(QUIET)),
        row("code", chat_template_kwargs={"enable_thinking": True}),
        row("code", chat_template_kwargs={"effort": "low"}),
    ]
    assert texts(rows) == [ASKED, ASKED, DONE, ASKED, ASKED + "low"]
    assert texts(rows, "--chat_template_kwargs", QUIET, 'math={"enable_thinking": true}') == [
        DONE,
        ASKED,
        DONE,
        ASKED,
        DONE + "low",  # the row's variables win one by one
    ]
    assert texts(rows, "--chat_template_kwargs", f"code={QUIET}")[:2] == [DONE, ASKED]


def test_variables_in_yaml_are_a_mapping_or_the_command_line_s_text(texts):
    rows = [row("code"), row("math")]
    assert texts(rows, content={"chat_template_kwargs": json.loads(QUIET)}) == [DONE, DONE]
    both = [{"enable_thinking": False}, 'math={"enable_thinking": true}']
    assert texts(rows, content={"chat_template_kwargs": both}) == [DONE, ASKED]
    assert texts(
        rows, f"--chat_template_kwargs=math={QUIET}", content={"chat_template_kwargs": both}
    ) == [ASKED, DONE], "the command line replaces the file's"


def test_a_variable_that_the_template_does_not_mention_is_said(texts):
    texts([row("a"), row("b")], "--chat_template_kwargs", '{"enable_thinkin": false}')
    assert texts.prompt_set.notes == (
        "--chat_template_kwargs sets 'enable_thinkin', which the chat template does not mention",
    )


def test_a_system_prompt_for_rows_that_have_none(texts):
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    rows = [row("math"), row("code"), row("math", prompt=own), row("chat")]
    general, math = "Answer with x = 3.", "Think hard"
    found = texts(rows, "--system_prompt", general, f"math={math}", "chat=")
    assert found == [
        f"<system>{math}<|end|>{ASKED}",
        f"<system>{general}<|end|>{ASKED}",
        f"<system>mine<|end|>{ASKED}",
        ASKED,
    ]
    assert texts(rows, content={"system_prompt": {"math": "- Be brief"}})[:2] == [
        f"<system>- Be brief<|end|>{ASKED}",
        ASKED,
    ]
    assert texts(rows[:1], "--system_prompt", "=x=1 is a fact") == [
        f"<system>x=1 is a fact<|end|>{ASKED}"
    ]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (SILENT, "leaves out the text of message 1, of role system"),
        (NO_SYSTEM, "refuses it: no system role"),
    ],
)
def test_a_template_without_a_place_for_a_system_prompt(texts, template, said):
    line = line_of(texts, [row("math")], "--system_prompt", "Be brief.", template=template)
    assert line.startswith("--system_prompt, in front of --data ") and said in line
    assert "remove the flag" in line
    assert texts([row("math")], template=template)


@pytest.mark.parametrize(
    "argv", [("--system_prompt", "Be brief."), ("--chat_template_kwargs", QUIET)]
)
def test_a_tokenizer_without_a_chat_template_refuses_both(texts, argv):
    assert line_of(texts, [row("math")], *argv, template=None).startswith(
        f"{argv[0]}: only a chat template can write it"
    )
    assert texts([row("math")], template=None) == ["hi"]


def test_variables_that_are_not_to_choose(texts):
    line = line_of(texts, [row("math")], "--chat_template_kwargs", '{"tokenize": true}')
    assert line.startswith("--chat_template_kwargs: tokenize is not a variable to choose")


def test_domains_that_no_row_has():
    flags = read_template_flags(DataConfig(system_prompt=["mth=Think", "Be brief."]))
    flags.check_domains({"mth"})
    line = line_of(flags.check_domains, {"math": ()})
    assert "the data has no domain mth, only math" in line and "=TEXT" in line
    flags = read_template_flags(DataConfig(chat_template_kwargs=[f"mth={QUIET}"]))
    assert line_of(flags.check_domains, {"math": ()}).startswith("--chat_template_kwargs mth=")
    flags = read_template_flags(DataConfig(system_prompt=["hard math=Think"]))
    assert "has spaces" in line_of(flags.check_domains, {"hard math": ()})


def test_the_flags_survive_the_way_through_config_yaml(tmp_path):
    argv = ["--chat_template_kwargs", QUIET, 'a={"b": "c=d"}', "--system_prompt", "- a\nb: {c}"]
    argv += ["--teacher", "math=m", "code=c", "--allow", "math=eos,template", "rendering"]
    config = parse(train_mopd.Config, argv)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    again = parse(train_mopd.Config, ["--config", str(path)])
    assert again.data == config.data and again.teachers == config.teachers
    assert again.teacher.allow == config.teacher.allow == ["math=eos,template", "rendering"]
