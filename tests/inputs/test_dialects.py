"""Teachers whose tokenizer, end of a response or chat template is not the student's own."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from opd.config import DataConfig
from opd.inputs.dialects import Dialect, check_dialects, check_eos, compare_tokenizers
from opd.inputs.prompts import MOST_SAMPLES, load_prompts
from tests.inputs.test_templates import END, EOS, TURN, VOCAB, make_tokenizer

# What the chat templates of hybrid and of coding models of one family do, in a few words: without
# tools and without variables both write the same, by other programs.
HYBRID = (
    "{% if tools %}<system>one {{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<assistant>{{ m.content.split('~')[-1] }}<|end|>{% else %}"
    "<{{ m.role }}>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<assistant>{% if enable_thinking is defined and enable_thinking is false %}(){% endif %}"
    "{% endif %}"
)
CODER = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set rest = "
    "messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% if said is defined or tools "
    "%}<system>{{ said if said is defined else 'I code' }}{% if tools %}{% for t in tools %}{{ "
    "t.function.name }}{% endfor %}{% endif %}<|end|>{% endif %}{% for m in rest %}<{{ m.role "
    "}}>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER_END = HYBRID.replace("content.split('~')[-1] }}<|end|>", "content.split('~')[-1] }}<turn|>")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WORDS = ("eos", "template", "rendering")


def tokenizer_of(template, *added: str):
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken(token) for token in added])
    return tokenizer


class Run:
    """Prompts of a student, and one teacher of the domain `d`."""

    def __init__(self, path: Path, student, rows, *, eval_rows=(), **flags):
        self.student, self.sets = student, {}
        for flag, some in (("--data", rows), ("--eval_data", eval_rows)):
            if some:
                file = path / f"{flag[2:]}.jsonl"
                file.write_text("".join(json.dumps({"data_source": "d"} | r) + "\n" for r in some))
                self.sets[flag] = load_prompts([str(file)], student, DataConfig(**flags), flag=flag)

    def check(self, teacher, *allow: str) -> frozenset[int]:
        """The ids of tokens that the two do not share, where the teacher is accepted."""
        foreign = compare_tokenizers("--teacher t", teacher, self.student, (EOS,))
        dialect = Dialect("t", "--teacher t", frozenset(allow), foreign, teacher)
        check_dialects([dialect], self.student, self.sets, {"d": (("t", 1.0),), "o": (("u", 1),)})
        return foreign.ids

    def refusal(self, teacher, *allow: str) -> str:
        """The one line, which the word that it ends with has to settle, and no other word."""
        with pytest.raises(ValueError) as caught:
            self.check(teacher, *allow)
        message = str(caught.value)
        assert message.startswith("--teacher t: ") and "\n" not in message
        return message


def settled_by(run: Run, teacher, word: str) -> str:
    """The refusal of a teacher that `--allow` accepts with `word`, and with no other word."""
    message = run.refusal(teacher, *(other for other in WORDS if other != word))
    assert message.endswith(f"choose a matching teacher, or accept it with --allow t={word}")
    run.check(teacher, word)
    return message


QUIET = {"chat_template_kwargs": ['{"enable_thinking": false}']}


# ---- Chat templates ------------------------------------------------------------------------------


def test_templates_of_other_source_that_write_the_same(tmp_path):
    rows = [
        {"prompt": "hi"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
        {
            "prompt": [
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "3"},
            ]
        },
    ]
    assert Run(tmp_path, tokenizer_of(HYBRID), rows).check(tokenizer_of(CODER)) == set()


def test_a_mode_that_the_teacher_does_not_know(tmp_path):
    """The student does not think, the prompt says so, and the teacher has never read that."""
    run = Run(tmp_path, tokenizer_of(HYBRID), [{"prompt": "hi"}], **QUIET)
    message = settled_by(run, tokenizer_of(CODER), "rendering")
    assert "data.jsonl, line 1 in another way, first '...ser>hi<|end|><assistant>' " in message
    assert "where the student's has '...ser>hi<|end|><assistant>()'" in message
    run.check(tokenizer_of(HYBRID + "{# of another release #}"))


def test_the_first_prompt_that_differs_is_shown_in_short(tmp_path):
    """Tools are written in other ways, and only one of many rows has some."""
    rows = [{"prompt": f"{i}"} for i in range(200)]
    rows[150] |= {"tools": [TOOL], "prompt": "q" * 500}
    run = Run(tmp_path, tokenizer_of(HYBRID), rows)
    message = settled_by(run, tokenizer_of(CODER), "rendering")
    assert "data.jsonl, line 151 in another way, first '<system>I codeweather<|end|" in message
    assert len(message) < 400


def test_held_out_prompts_count_and_those_of_other_teachers_do_not(tmp_path):
    odd = {"prompt": "hi", "tools": [TOOL]}
    student, teacher = tokenizer_of(HYBRID), tokenizer_of(CODER)
    Run(tmp_path, student, [{"prompt": "hi"}, odd | {"data_source": "o"}]).check(teacher)
    run = Run(tmp_path, student, [{"prompt": "hi"}], eval_rows=[odd])
    assert "--eval_data " in settled_by(run, teacher, "rendering")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no user') }}", "the chat template refuses it: no user"),
        ("<user>always the same", "the chat template leaves out the text of message 1"),
        (None, "it has no chat template, and the student's tokenizer has one"),
    ],
)
def test_a_template_that_cannot_write_the_prompts(tmp_path, template, said):
    run = Run(tmp_path, tokenizer_of(HYBRID), [{"prompt": "hi"}])
    assert said in settled_by(run, tokenizer_of(template), "template")


def test_a_student_without_a_template(tmp_path):
    run = Run(tmp_path, tokenizer_of(None), [{"prompt": "hi"}])
    run.check(tokenizer_of(None))
    assert "the student's tokenizer has none" in settled_by(run, tokenizer_of(HYBRID), "template")


def test_another_end_of_a_turn(tmp_path):
    """No prompt shows it, but the teacher has learned to end its answers there."""
    run = Run(tmp_path, tokenizer_of(HYBRID), [{"prompt": "hi"}])
    message = settled_by(run, tokenizer_of(OTHER_END), "eos")
    assert "ends a turn with '<turn|>', the student's with '<|end|>'" in message


def test_few_of_many_chats_are_tried_and_one_of_each_kind(tmp_path):
    rows = [{"prompt": f"{i}"} for i in range(1000)]
    rows[777] |= {"tools": [TOOL]}
    (samples,) = Run(tmp_path, tokenizer_of(HYBRID), rows).sets["--data"].samples.values()
    assert len(samples) == MOST_SAMPLES
    lines = [int(sample.where.rpartition(" ")[2]) for sample in samples]
    assert 778 in lines and max(lines) > 900 and len(set(lines)) == MOST_SAMPLES
    assert all(str(sample.chat.messages[0]["content"]) in sample.text for sample in samples)


# ---- Where responses end -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "own", "ends", "fits"),
    [
        ([EOS], [EOS], [EOS], True),
        ([EOS, END], [EOS], [EOS, END], True),  # --stop_token_ids closes the gap
        ([EOS], [EOS], [EOS, TURN], True),  # or ends responses sooner than any EOS
        ([EOS, END], [EOS], [EOS], False),
        ([END], [EOS], [EOS, END], False),
        ([EOS], [EOS, END], [EOS, END], False),
    ],
)
def test_eos(theirs, own, ends, fits):
    tokenizer = tokenizer_of(None)

    def check(*allow):
        dialect = Dialect("t", "--teacher t", frozenset(allow), None, None)
        check_eos(dialect, tokenizer, theirs, own, ends)

    check("eos")
    if fits:
        check()
        return
    with pytest.raises(ValueError) as caught:
        check("template", "rendering")
    assert str(caught.value).endswith("or accept it with --allow t=eos")
    assert (f"--stop_token_ids {END}," in str(caught.value)) == (theirs == [EOS, END])


def test_a_template_that_ends_a_turn_where_no_response_ends(tmp_path):
    def notes(template, *eos_ids: int):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"data_source": "d", "prompt": "hi"}))
        tokenizer = tokenizer_of(template)
        options = {"flag": "--data", "eos_ids": eos_ids}
        return load_prompts([str(path)], tokenizer, DataConfig(), **options).notes

    (note,) = notes(HYBRID, EOS)
    assert note.startswith("the chat template ends a turn with <|end|>, at which no response ends")
    assert note.endswith("--stop_token_ids '<|end|>'")
    assert not notes(HYBRID, EOS, END)
    assert not notes("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", EOS)
    assert not notes(None, EOS)


# ---- Tokenizers ----------------------------------------------------------------------------------


def test_added_tokens_that_no_prompt_has(tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "<think>", "data_source": "o"}]
    run = Run(tmp_path, tokenizer_of(HYBRID, "<think>"), rows)
    first = run.student.get_vocab()["<think>"]
    assert run.check(tokenizer_of(HYBRID)) == {first}
    assert run.check(tokenizer_of(HYBRID, "<tool_response>", "<think>")) == {first, first + 1}


@pytest.mark.parametrize(
    ("mine", "theirs"), [(("<think>",), ()), ((), ("<think>",)), (("<think>",), ("<t>", "<think>"))]
)
def test_added_tokens_that_a_prompt_has(tmp_path, mine, theirs):
    """The student's own, the teacher's own, and one under two ids."""
    rows = [{"prompt": "hi"}, {"prompt": "a <think> b"}]
    run = Run(tmp_path, tokenizer_of(HYBRID, *mine), rows)
    message = run.refusal(tokenizer_of(HYBRID, *theirs), *WORDS)
    assert "'<think>'" in message and "a row of --data uses it (prompt 1, domain d)" in message
    run = Run(tmp_path, tokenizer_of(HYBRID, *mine), rows[:1], eval_rows=rows)
    assert "a row of --eval_data uses it" in run.refusal(tokenizer_of(HYBRID, *theirs))


def test_a_dataset_response_counts_as_a_prompt_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"data_source": "d", "prompt": "hi", "response": "<think>"}))
    run = Run(tmp_path, tokenizer_of(HYBRID, "<think>"), [])
    run.sets["--data"] = load_prompts(
        [str(path)], run.student, DataConfig(), flag="--data", need_response=True
    )
    assert "'<think>'" in run.refusal(tokenizer_of(HYBRID))


def test_words_proper_must_be_the_same():
    class Other:
        def get_vocab(self):
            return VOCAB | {"a": VOCAB["b"], "b": VOCAB["a"]}

        def get_added_vocab(self):
            return {}

    with pytest.raises(ValueError, match=r"2 tokens differ, first 'a' \(id .*, the student's"):
        compare_tokenizers("--teacher t", Other(), tokenizer_of(None), ())


def test_a_token_that_the_run_writes_itself():
    with pytest.raises(ValueError, match=r"'<pad2>', ends or pads responses"):
        mine = tokenizer_of(None, "<pad2>")
        compare_tokenizers("F", tokenizer_of(None), mine, (len(VOCAB),))
