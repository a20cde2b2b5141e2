"""Prompts that teachers alone read: how they are written, and what is wrong with them."""

import json

import pytest
import yaml
from PIL import Image

import train_mopd
from opd.inputs.arguments import parse
from opd.inputs.dialects import Dialect, check_dialects, compare_tokenizers
from opd.inputs.identity import fingerprint_of
from opd.inputs.own_prompts import warn_of_first_tokens
from opd.inputs.prompts import load_prompts
from opd.inputs.teacher_prompts import own_prompts, with_bounds
from opd.ops.pixels import Pixels
from opd.options import to_dict
from scripts.demos.vision_models import CHAT_TEMPLATE, make_processor
from tests.inputs.test_template_flags import HYBRID, QUIET, line_of
from tests.inputs.test_templates import make_tokenizer

ROWS = [
    {"data_source": "d", "prompt": "2+3", "answer": "5", "hint": "five", "n": 7},
    {
        "data_source": "d",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}],
        "answer": "2",
        "hint": [{"role": "system", "content": "t"}, {"role": "user", "content": "two"}],
    },
    {"data_source": "o", "prompt": "hi", "answer": "", "hint": "never read"},
]
TWO = {"teachers": [{"name": "d", "model": "m"}, {"name": "o", "model": "m"}]}


class Read:
    """Rows read by the flags of a command line and a YAML file."""

    def __init__(self, path):
        self.path = path

    def config(self, *argv: str, content: dict = TWO):
        file = self.path / "c.yaml"
        file.write_text(yaml.safe_dump(content))
        required = ("--student_model", "s", "--data", "d", "--output_dir", "o")
        return parse(train_mopd.Config, [*required, "--config", str(file), *argv])

    def set(
        self, *argv: str, rows=ROWS, template=HYBRID, content: dict = TWO, held_out=False, added=()
    ):
        config, path = self.config(*argv, content=content), self.path / "rows.jsonl"
        config.validate()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer = make_tokenizer(template)
        self.tokenizer.add_tokens(added)
        return load_prompts(
            [str(path)],
            self.tokenizer,
            config.data,
            flag="--eval_data" if held_out else "--data",
            own_prompts=own_prompts(config).values(),
            teachers=config.teachers,
            is_held_out=held_out,
        )

    def texts(self, *argv: str, **options) -> list[dict[str, str]]:
        """What teachers read of each row in place of the student's prompt."""
        return [
            {name: self.decoded(ids) for name, ids in prompt.teacher_ids.items()}
            for prompt in self.set(*argv, **options).prompts
        ]

    def decoded(self, ids: list[int]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))


@pytest.fixture
def read(tmp_path):
    return Read(tmp_path)


# ---- What a teacher reads ------------------------------------------------------------------------


def test_without_one_a_teacher_reads_the_student_s(read):
    (prompt, *_) = read.set().prompts
    assert prompt.teacher_ids == {} and prompt.ids_for("d") is prompt.token_ids
    assert prompt.text == "2+3" and prompt.longest == len(prompt.token_ids)


def test_a_column_is_text_or_messages(read):
    first, second, other = read.texts("--teacher_prompt", "d=hint", "--system_prompt", "d=x")
    assert first == {"d": "<system>x<|end|><user>five<|end|><assistant>"}
    assert second == {"d": "<system>t<|end|><user>two<|end|><assistant>"}
    assert other == {}, "of a domain of another teacher"


def test_a_text_is_the_last_user_message(read):
    first, second, other = read.texts("--teacher_prompt", "d={prompt} Hint: {answer} {{n}}")
    assert first == {"d": "<user>2+3 Hint: 5 {n}<|end|><assistant>"}
    assert second == {"d": "<system>s<|end|><user>1+1 Hint: 2 {n}<|end|><assistant>"}
    assert other == {}
    (number,) = read.texts("--teacher_prompt", "d={prompt}{n}", rows=ROWS[:1])
    assert number == {"d": "<user>2+37<|end|><assistant>"}


def test_the_prompt_s_own_column_is_the_field_prompt(read):
    rows = [{"data_source": "d", "q": "a", "answer": "b"}]
    (found,) = read.texts("--teacher_prompt", "{q}{prompt}{answer}", "--prompt_key", "q", rows=rows)
    assert found == {"d": "<user>aab<|end|><assistant>"}


def test_a_system_message_takes_the_place_of_the_row_s(read):
    argv = ("--teacher_prompt", "d=system:Be {answer}.", "--system_prompt", "x")
    first, second, other = read.texts(*argv)
    assert first == {"d": "<system>Be 5.<|end|><user>2+3<|end|><assistant>"}
    assert second == {"d": "<system>Be 2.<|end|><user>1+1<|end|><assistant>"} and other == {}


def test_variables_of_a_teacher_win(read):
    rows = [ROWS[0], ROWS[0] | {"chat_template_kwargs": {"effort": "low"}}]
    argv = ("--chat_template_kwargs", QUIET, "--teacher_chat_template_kwargs")
    loud = read.texts(*argv, 'd={"enable_thinking": true}', rows=rows)
    assert [text["d"] for text in loud] == [
        "<user>2+3<|end|><assistant>",
        "<user>2+3<|end|><assistant>low",
    ]
    (_, high) = read.texts(*argv, '{"effort": "high"}', rows=rows)
    assert high == {"d": "<user>2+3<|end|><assistant>()high"}
    assert read.texts(*argv, QUIET, rows=rows) == [{}, {}], "the same as the student's"


def test_every_teacher_of_a_mixture_reads_its_own(read):
    entries = [
        {"name": "a", "model": "m", "domains": ["d"], "weight": 1, "teacher_prompt": "{answer}"},
        {"name": "b", "model": "m", "domains": ["d"], "weight": 2, "teacher_prompt": "hint",
         "teacher_chat_template_kwargs": {"effort": "!"}},
        {"name": "c", "model": "m", "domains": ["d"], "weight": 1},
        {"name": "o", "model": "m"},
    ]  # fmt: skip
    first, *_ = read.texts(content={"teachers": entries})
    assert first == {"a": "<user>5<|end|><assistant>", "b": "<user>five<|end|><assistant>!"}
    entries[1]["teacher_prompt"] = ""
    first, *_, other = read.texts("--teacher_prompt", "{prompt}?", content={"teachers": entries})
    assert first["a"] == "<user>5<|end|><assistant>", "an entry wins over the flag for all"
    assert first["b"].startswith("<user>2+3?") and first["c"] == "<user>2+3?<|end|><assistant>"
    assert other == {"o": "<user>hi?<|end|><assistant>"}
    *_, other = read.texts(
        *("--teacher_prompt", "{prompt}?", "o=", "c="), content={"teachers": entries}
    )
    assert other == {}, "an empty one is none"


def test_a_tokenizer_without_a_chat_template(read):
    rows = [{"data_source": "d", "prompt": "ab", "hint": "cd"}]
    assert read.texts("--teacher_prompt", "hint", rows=rows, template=None) == [{"d": "cd"}]
    assert read.texts("--teacher_prompt", "{hint}{prompt}", rows=rows, template=None) == [
        {"d": "cdab"}
    ]
    argv = ("--teacher_prompt", "system:x")
    line = line_of(read.texts, *argv, rows=rows, template=None)
    assert "--teacher_prompt of teacher d: only a chat template can write it" in line


def test_a_longer_prompt_is_found_and_bounds_the_engine_of_its_teacher_alone(read):
    argv = ("--teacher_prompt", "d={prompt} and a long hint: {answer}", "--max_prompt_tokens", "20")
    found, config = read.set(*argv), read.config(*argv)
    longest = found.longest_of("d")
    said = (
        "<system>",
        *"s",
        "<|end|>",
        "<user>",
        *"1+1 and a long hint: 2",
        "<|end|>",
        "<assistant>",
    )
    assert longest == len(said) > 20
    assert found.longest_of("o") == 0
    specs = {s.name: s for s in with_bounds(config, {"d": longest, "o": 0}).teachers}
    assert specs["d"].max_teacher_prompt_tokens == longest
    assert specs["o"].max_teacher_prompt_tokens == 0
    again = parse(train_mopd.Config, ["--config", written(read, with_bounds(config, {"d": 99}))])
    assert again.teachers[0].max_teacher_prompt_tokens == 99, "config.yaml keeps it"


def written(read, config) -> str:
    path = read.path / "again.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return str(path)


def test_what_the_file_of_a_run_says_is_read_back(read):
    entry = {"name": "d", "model": "m", "teacher_prompt": "{answer}",
             "teacher_chat_template_kwargs": {"enable_thinking": True}}  # fmt: skip
    content = {"teachers": [entry], "teacher_prompt": {"o": "x={prompt}"}}
    config = read.config(content=content)
    assert config.privilege.teacher_prompt == ["o=x={prompt}"]
    again = parse(train_mopd.Config, ["--config", written(read, config)])
    assert again.teachers == config.teachers and again.privilege == config.privilege


# ---- Held-out rows -------------------------------------------------------------------------------


def test_held_out_rows_may_all_lack_the_column(read):
    """The teacher is then evaluated on the student's prompts, and the user told."""
    rows = [{k: v for k, v in row.items() if k != "hint"} for row in ROWS]
    found = read.set("--teacher_prompt", "d=hint", rows=rows, held_out=True)
    assert not any(prompt.teacher_ids for prompt in found.prompts)
    assert "no row has column `hint`, so teacher d reads the student's prompts" in found.summary
    mixed = [ROWS[0], rows[1]]
    line = line_of(read.set, "--teacher_prompt", "d=hint", rows=mixed, held_out=True)
    assert "line 2: column `hint` is missing" in line


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("d=hint_", "line 1: column `hint_` is missing, which --teacher_prompt of teacher d needs"),
        ("d=hint_", "; did you mean hint?"),
        ("d={promp}", "the row has data_source, prompt, answer, hint, n; did you mean prompt?"),
        ("d={prompt}{m}", "line 1: column `m` is missing"),
        ("o={prompt}{answer}", "line 3: column `answer` is empty"),
        ("d={prompt} {n}", "line 2: column `n` is missing"),
        ("d=my_module:hints", "a function is python:MODULE:FUNCTION"),
        ("d=Be a good teacher", "; a text has columns in braces, such as {prompt}"),
        ("x=hint", "--teacher_prompt x=...: no teacher is called x, only d, o; a text that begins"),
        ("", "--teacher_prompt: the text is empty"),
        ("d=system:", "the system message is empty; write system:TEXT"),
        ("d={prompt", "expected '}' before end of string; a field is a column, such as {prompt}"),
        ("d={answer!r}", "a field is a column, such as {prompt}"),
        ("d={answer:>3}", "a field is a column"),
        ('d={prompt} {"x": 1}', "braces of the text itself are doubled: {{ }}"),
        ("d={}", "a field is a column"),
        ("d=python:hints", "write python:MODULE:FUNCTION"),
        ("d=python:m:f", "is not known before they are made; give --max_teacher_prompt_tokens"),
    ],
)
def test_what_is_wrong_is_a_line(read, argv, said):
    assert said in line_of(read.set, "--teacher_prompt", argv)


def test_given_twice_is_a_line(read):
    assert "given twice for the teacher d" in line_of(
        read.set, "--teacher_prompt", "d=hint", "d=answer"
    )
    entry = {"name": "d", "model": "m", "teacher_prompt": "hint",
             "teacher_chat_template_kwargs": {"effort": "x"}}  # fmt: skip
    content = {"teachers": [entry, {"name": "o", "model": "m"}]}
    for flag, value in (("teacher_prompt", "d=n"), ("teacher_chat_template_kwargs", "d={}")):
        line = line_of(read.set, f"--{flag}", value, content=content)
        assert line.startswith(f"--{flag} d=...: its entry in `teachers` has")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("d=[1]", "not a JSON object"),
        ("d=effort", "not JSON"),
        ('x={"effort": "a"}', "no teacher is called x, only d, o"),
        ('{"tokenize": true}', "tokenize is not a variable to choose"),
    ],
)
def test_variables_that_are_wrong_are_a_line(read, value, said):
    line = line_of(read.set, "--teacher_chat_template_kwargs", value)
    assert line.startswith("--teacher_chat_template_kwargs") and said in line


def test_entries_are_checked_like_flags(read):
    for key, value, said in (
        ("teacher_prompt", 7, "teacher_prompt must be text, got 7"),
        ("teacher_prompts", "a", "unknown key `teacher_prompts`; did you mean teacher_prompt?"),
        ("teacher_chat_template_kwargs", [1], "teacher_chat_template_kwargs must be an object"),
        ("teacher_chat_template_kwargs", "[1]", "not a JSON object"),
        ("max_teacher_prompt_tokens", -1, "max_teacher_prompt_tokens must be a whole number"),
    ):
        content = {"teachers": [{"name": "d", "model": "m", key: value}]}
        assert said in line_of(read.set, content=content), key


@pytest.mark.parametrize("value", [None, "", " ", 3, [], [{"role": "assistant", "content": "x"}]])
def test_a_value_that_is_no_prompt_names_its_row(read, value):
    rows = [ROWS[0], {"data_source": "d", "prompt": "a", "hint": value}]
    assert "rows.jsonl, line 2: column `hint`" in line_of(
        read.set, "--teacher_prompt", "hint", rows=rows
    )


def test_a_chat_without_a_user_has_no_place_for_a_text(read):
    rows = [{"data_source": "d", "prompt": [{"role": "system", "content": "s"}], "answer": "a"}]
    for value in ("{answer}", "python:m:f"):
        argv = ("--teacher_prompt", value, "--max_teacher_prompt_tokens", "9")
        assert "has no user message into which" in line_of(read.set, *argv, rows=rows)


def test_one_that_is_too_long_names_its_row(read):
    argv = ("--teacher_prompt", "d={prompt}{answer}", "--max_teacher_prompt_tokens")
    assert read.set(*argv, "7", rows=ROWS[:1]).longest_of("d") == 7
    rows = [ROWS[0], ROWS[0] | {"answer": "12"}]
    line = line_of(read.set, *argv, "7", rows=rows)
    assert "line 2: --teacher_prompt of teacher d: 8 tokens, over --max_teacher_prompt" in line
    dropped = [ROWS[0], {"data_source": "d", "prompt": "long" * 9, "answer": "1"}]
    kept = read.set(*argv, "7", "--max_prompt_tokens", "10", rows=dropped)
    assert len(kept.prompts) == 1 and kept.overlong == {"d": 1}


# ---- Another run ---------------------------------------------------------------------------------


def test_another_one_is_another_run(read, monkeypatch):
    monkeypatch.setattr("opd.inputs.identity.content_hash", lambda path: "s")

    def identity(*argv: str) -> tuple:
        found = read.set(*argv)
        config = read.config(*argv)
        print_of = fingerprint_of(config, {"d": "m", "o": "m"}, found.content_hash)
        return json.dumps(print_of, sort_keys=True), found.content_hash

    plain = identity()
    assert '"prompt"' not in plain[0], "checkpoints without any are read as before"
    of = {}
    for argv in (
        ("--teacher_prompt", "d={prompt}{answer}"),
        ("--teacher_prompt", "d={prompt} {answer}"),
        ("--teacher_prompt", "d=hint"),
        ("--teacher_prompt", "{prompt}{hint}", "d=hint"),
        ("--teacher_prompt", "d=system:a"),
        ("--teacher_chat_template_kwargs", '{"effort": "a"}'),
        ("--teacher_prompt", "python:m:f", "--max_teacher_prompt_tokens", "50"),
        ("--teacher_prompt", "python:m:f", "--max_teacher_prompt_tokens", "51"),
        ("--teacher_prompt", "python:m:g", "--max_teacher_prompt_tokens", "50"),
    ):
        of[argv] = identity(*argv)
    assert len({plain, *of.values()}) == len(of) + 1
    changed = [found[1] != plain[1] for argv, found in of.items() if "python:m:f" not in argv]
    assert changed == [True] * 6 + [False], "the content of the data, but of what is made later"
    same = ("--teacher_prompt", "d={prompt}{answer}", "--max_teacher_prompt_tokens", "99")
    assert identity(*same) == of["--teacher_prompt", "d={prompt}{answer}"]


# ---- The first token -----------------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinks %}<think>{% endif %}{% endif %}"
)


def first_token(read, capsys, *argv: str, **options) -> str:
    found = read.set(*argv, rows=ROWS[:2], **options)
    warn_of_first_tokens(own_prompts(read.config(*argv)).values(), read.tokenizer, [found, found])
    return capsys.readouterr().err


def test_a_teacher_that_begins_otherwise_is_told_of(read, capsys):
    argv = ("--teacher_chat_template_kwargs", 'd={"enable_thinking": true}')
    said = first_token(read, capsys, "--chat_template_kwargs", QUIET, *argv)
    assert len(said.splitlines()) == 1
    assert "teacher d: its prompt ends with '<assistant>' where the student's ends with " in said
    assert "'<assistant>()', so the first token of a response means something else to it" in said
    argv = ("--teacher_chat_template_kwargs", '{"thinks": true}')
    said = first_token(read, capsys, *argv, template=THINKING)
    assert "'<assistant><think>' (inside an open <think>) where" in said


def test_a_hint_or_a_system_message_changes_no_first_token(read, capsys):
    for value in ("{prompt}{answer}", "hint", "system:x"):
        assert first_token(read, capsys, "--teacher_prompt", f"d={value}") == ""
    assert first_token(read, capsys, "--teacher_chat_template_kwargs", '{"other": 1}') == ""


# ---- Teachers of another kind --------------------------------------------------------------------


def refused(read, teacher, *argv: str) -> str:
    """The line that a teacher of domain `d` gets on its prompts; empty where it is accepted."""
    rows = [ROWS[0], ROWS[0] | {"hint": "a <think>"}]
    prompts = read.set(*argv, rows=rows, template=HYBRID, added="<think>")
    foreign = compare_tokenizers("--teacher d", teacher, read.tokenizer, (0,))
    dialect = Dialect("d", "--teacher d", frozenset(), foreign, teacher)
    try:
        check_dialects([dialect], read.tokenizer, {"--data": prompts}, {"d": (("d", 1.0),)})
    except ValueError as error:
        return str(error)
    return ""


def test_a_teacher_is_tried_on_what_it_reads(read):
    """Its tokens, and its chat template, on its own prompts and not on the student's."""
    assert refused(read, make_tokenizer(HYBRID)) == ""
    line = refused(read, make_tokenizer(HYBRID), "--teacher_prompt", "d=hint")
    assert "only one of them has '<think>'" in line and "(prompt 1, domain d)" in line
    other = make_tokenizer(HYBRID + "{% if 'five' in messages[0].content %}!{% endif %}")
    assert refused(read, other) == ""
    line = refused(read, other, "--teacher_prompt", "d={prompt}{answer} five")
    assert "its chat template writes" in line and "line 1" in line


# ---- Images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    make_processor().save_pretrained(path)
    return Pixels(str(path))


def seen(read, pixels, *argv: str, prompt: str = "ab", **more):
    """The prompt of a row with an image."""
    Image.new("RGB", (32, 32), "red").save(read.path / "red.png")
    row = {"data_source": "d", "prompt": prompt, "images": "red.png", "answer": "12", **more}
    (read.path / "rows.jsonl").write_text(json.dumps(row))
    config, tokenizer = read.config(*argv), pixels.processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or pixels.processor.chat_template
    image = tokenizer.convert_tokens_to_ids("<image>")
    (found,) = load_prompts(
        [str(read.path / "rows.jsonl")],
        tokenizer,
        config.data,
        flag="--data",
        pixels=pixels,
        placeholder_ids=(image,),
        own_prompts=own_prompts(config).values(),
        teachers=config.teachers,
    ).prompts
    return found


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("{prompt}+{answer}", "<image>ab+12"),
        ("{answer}<image>", "12<image>"),
        ("{answer}", "<image>12"),
        ("hint", "cd<image>"),
    ],
)
def test_a_teacher_s_prompt_shows_the_row_s_images(read, pixels, argv, told):
    prompt = seen(read, pixels, "--teacher_prompt", f"d={argv}", hint="cd<image>")
    images, students = prompt.images_for("d"), prompt.images
    assert prompt.text == "<image>ab" and told in images.text and images.text != students.text
    assert images.pictures == students.pictures
    assert images.num_tokens == len(prompt.ids_for("d"))
    assert prompt.ids_for("d") == pixels.expanded(images.text, images.pictures)
    assert images.unexpanded([*prompt.ids_for("d"), 7]) == [*images.unexpanded_ids, 7]
    assert prompt.images_for("other") is students
    assert prompt.as_read_by("d").images is images


def test_a_system_message_beside_an_image(read, pixels):
    """The image stays where the user shows it; `{prompt}` is the text around it."""
    pixels.processor.tokenizer.chat_template = CHAT_TEMPLATE
    prompt = seen(
        read, pixels, "--teacher_prompt", "d=system:{answer}:{prompt}", prompt="<image>ab"
    )
    images = prompt.images_for("d")
    assert images.text == "<system>12:ab<user><image>ab<assistant>"
    assert prompt.ids_for("d") == pixels.expanded(images.text, images.pictures)
    line = line_of(seen, read, pixels, "--teacher_prompt", "d=system:<image>{answer}")
    assert "line 1: --teacher_prompt of teacher d: a system message shows no image" in line
    shows = [{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": "ab"}]
    line = line_of(seen, read, pixels, "--teacher_prompt", "d=system:{answer}", prompt=shows)
    assert "it takes the place of a system message that shows an image" in line


def test_a_text_that_shows_other_images_is_a_line(read, pixels):
    for text in ("d={prompt}<image>", "d={answer}<image><image>"):
        line = line_of(seen, read, pixels, "--teacher_prompt", text)
        assert "line 1: --teacher_prompt of teacher d: the prompt shows 2 images" in line
