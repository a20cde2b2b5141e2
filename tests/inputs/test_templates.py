"""Chat templates that fail, leave out, want another form, end a turn in their own way, or write the
date.
"""

import json
import string
from datetime import datetime

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.config import DataConfig
from opd.inputs import templates
from opd.inputs.prompts import load_prompts

SPECIAL = ("<eos>", "<pad>", "<|end|>", "<turn|>", "<user>", "<assistant>", "<system>", "<tool>")
VOCAB = {token: i for i, token in enumerate((*SPECIAL, *string.printable, "<unk>"))}
EOS, END, TURN = (VOCAB[token] for token in ("<eos>", "<|end|>", "<turn|>"))

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}"
)
# Models that see images: a content is a list of parts, and a text is a list of letters, none of
# which is a part.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' "
    "%}{{ part.text }}{% elif part.type == 'image' %}[image]{% endif %}{% endfor %}<|end|>{% "
    "endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = "{% if tools %}<system>{{ tools | tojson }}{% endif %}" + PLAIN
WITH_CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}{{ "
    "c.function.name + '=' + ARGUMENTS }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor "
    "%}<assistant>"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def make_tokenizer(chat_template: str | dict | None) -> PreTrainedTokenizerFast:
    """One token per character."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, **special
    )


@pytest.fixture
def load(tmp_path):
    """Rows, read by a template, as (texts of the prompts, prompt set)."""

    def load(chat_template, *rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"data_source": "d", **row}) + "\n" for row in rows))
        tokenizer = make_tokenizer(chat_template)
        prompt_set = load_prompts([str(path)], tokenizer, DataConfig(), flag="--data", **options)
        return [
            "".join(tokenizer.convert_ids_to_tokens(p.token_ids)) for p in prompt_set.prompts
        ], prompt_set

    return load


@pytest.fixture
def refusal(load):
    """The one line with which rows are refused, without flag and file."""

    def refusal(chat_template, *rows, **options) -> str:
        with pytest.raises(ValueError) as caught:
            load(chat_template, *rows, **options)
        where, _, reason = str(caught.value).partition("rows.jsonl, ")
        assert where.startswith("--data ") and reason and "\n" not in reason, str(caught.value)
        return reason

    return refusal


def turn(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


# ---- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "RecursionError: maximum recursion depth exceeded",
        ),
        ("{{ messages[7].content + 'a' }}", "list object has no element 7"),
        ("{{ messages.pop(3) }}", "'pop' of 'list' object is unsafe"),
        ("{{ messages[0].content | no_such_filter }}", "No filter named 'no_such_filter'"),
        (
            "{% if 1 > 2 %}{{ 'a' | no_such_filter }}{% else %}{{ 'a' | sum(start=[]) }}{% endif "
            "%}",
            "can only concatenate",
        ),
        ("{{ messages[0].content.index('~') }}", "substring not found"),
        ("{{ messages[0].no_such_key.content }}", "has no attribute 'no_such_key'"),
        ("{{ {}.popitem() }}", "is unsafe"),
        ("{{ 'x' * 10 ** 15 }}", "MemoryError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ '%d' % 'a' }}", "%d format"),
        ("{{ 'a'.encode('no_such_codec') }}", "LookupError: unknown encoding"),
        ("{{ raise_exception('this\nis  refused') }}", "this is refused"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].__class__.__mro__ }}{{ messages[0].content }}", "unsafe"),
        ("{{ messages[0].content }}\\ud800", "'utf-8' codec can't encode"),
        ({"rag": PLAIN}, "multiple chat templates"),
    ],
)
def test_whatever_a_template_does_wrong_is_one_line_with_its_words(refusal, template, said):
    template = (
        template.replace("\\ud800", "{{ '\\ud800' }}") if isinstance(template, str) else template
    )
    line = refusal(template, {"prompt": "hello"})
    assert (
        line.startswith("line 1: column `prompt`: the chat template refuses it: ") and said in line
    ), line


def test_a_template_that_does_not_end(refusal, monkeypatch):
    monkeypatch.setattr(templates, "TIME_LIMIT_S", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "refuses it: TimeoutError: it takes more than 0.2 s" in refusal(
        loops, {"prompt": "hello"}
    )


def test_the_row_that_a_template_fails_at_is_named(refusal):
    template = (
        "{% for m in messages %}{{ m.content }}{{ 6 // (m.content | length - 3) }}{% endfor %}"
    )
    assert refusal(template, {"prompt": "four"}, {"prompt": "six"}, {"prompt": "a"}).startswith(
        "line 2: column `prompt`"
    )


# ---- Leaving out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hello", "a", "user", "[image]", "xx", " xxx ", "type text"])
def test_templates_of_models_that_see_images_get_parts(load, prompt):
    """Whatever the text is, also if the template itself contains it."""
    texts, _ = load(
        PARTS, {"prompt": prompt}, {"prompt": [turn("system", "be"), turn("user", prompt)]}
    )
    assert texts == [
        f"<user>{prompt}<|end|><assistant>",
        f"<system>be<|end|><user>{prompt}<|end|><assistant>",
    ]


@pytest.mark.parametrize(
    "template",
    [
        "<user> <assistant>",
        "{% for m in messages %}<{{ m.role }}>{{ m.contents }}{% endfor %}",
        # one token for every letter that is no text: not the same for all texts, but never the text
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'word' %}{{ c.text }}{% "
        "else %}?{% endif %}{% endfor %}{% endfor %}<assistant>",
        "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}{% "
        "endfor %}<assistant>",
    ],
)
def test_a_template_that_renders_no_text_is_refused(refusal, template):
    assert "the chat template leaves out the text of message 1, of role user" in refusal(
        template, {"prompt": "user"}
    )


def test_a_role_that_the_template_does_not_know_is_refused(refusal, load):
    template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% "
        "endfor %}"
    )
    for role in ("system", "tool", "developer", "a\nb"):
        prompt = [turn("user", "one"), turn(role, "one"), turn("user", "two")]
        said = refusal(template, {"prompt": prompt})
        assert f"leaves out the text of message 2, of role {' '.join(role.split())}" in said
    assert load(template, {"prompt": [turn("user", "one")]})[0] == ["<user>one"]


@pytest.mark.parametrize(
    ("expression", "prompt", "text"),
    [
        ("m.content.strip()", " a b ", "a b"),
        ("m.content | upper", "a b", "A B"),
        ("m.content | lower", "XX", "xx"),
        ("m.content | replace(' ', '')", "a b", "ab"),
        ("m.content | tojson", 'a"b', '"a\\"b"'),
        ("'q: ' + m.content", "a", "q: a"),
        ("m.content.split('/')[-1]", "no/yes", "yes"),
        ("m.content[:2]", "abc", "ab"),
        ("m.content | reverse", "abc", "cba"),
        ("m.content | e", "<b>", "&lt;b&gt;"),
    ],
)
def test_a_template_may_change_a_text(load, expression, prompt, text):
    template = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    assert load(template, {"prompt": prompt})[0] == [text]


def test_a_template_may_drop_thinking_and_old_answers(load):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% elif loop.last "
        "%}{{ m.content }}{% else %}<assistant>{{ m.content.split('</t>')[-1] if '</t>' in "
        "m.content }}{% endif %}{% endfor %}"
    )
    prompt = [
        turn("user", "a"),
        turn("assistant", "<t>b</t>c"),
        turn("user", "d"),
        turn("assistant", "e"),
        turn("user", "f"),
    ]
    assert load(template, {"prompt": prompt})[0] == ["<user>a<assistant>c<user>d<assistant><user>f"]


def test_a_template_of_texts_never_gets_parts(refusal):
    """It would write them as Python does."""
    template = (
        "{% for m in messages %}{{ raise_exception('no') if m.content == 'bad' else m.content }}{% "
        "endfor %}"
    )
    line = refusal(template, {"prompt": "good"}, {"prompt": "bad"})
    assert line == "line 2: column `prompt`: the chat template refuses it: no"


# ---- Tools and variables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tools",
    [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)], [{**WEATHER, "strict": None}]],
)
def test_tools_reach_the_template(load, tools):
    texts, _ = load(
        WITH_TOOLS, {"prompt": "a", "tools": tools}, {"prompt": "a", "tools": None}, {"prompt": "a"}
    )
    assert texts == [
        f"<system>{json.dumps([WEATHER])}<user>a<|end|><assistant>",
        *["<user>a<|end|><assistant>"] * 2,
    ]


def test_tools_as_text_keep_their_nulls(load):
    tools = [{"name": "f", "default": None}]
    assert json.dumps(tools) in load(WITH_TOOLS, {"prompt": "a", "tools": json.dumps(tools)})[0][0]


@pytest.mark.parametrize("nothing", [None, [], "", " ", "[]", "null"])
def test_no_tools(load, nothing):
    for template in (PLAIN, None):
        with_nothing, _ = load(
            template, {"prompt": "a", "tools": nothing, "chat_template_kwargs": nothing}
        )
        assert with_nothing == load(template, {"prompt": "a"})[0]


def test_tools_that_no_prompt_would_show_are_refused(refusal):
    row = {"prompt": "a", "tools": [WEATHER]}
    assert "the chat template leaves out the tools of column `tools`" in refusal(PLAIN, row)
    assert "the chat template leaves out the tools of column `tools`" in refusal(PARTS, row)
    assert "column `tools` needs a chat template, and the tokenizer has none" in refusal(None, row)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("tools", "a", "text that is not JSON"),
        ("tools", {"name": "f"}, "must be a list of JSON schemas"),
        ("tools", '{"name": "f"}', "must be a list of JSON schemas"),
        ("tools", ["a"], "text that is not JSON"),
        ("tools", [["a"]], "must be a list of JSON schemas"),
        ("tools", [None], "must be a list of JSON schemas"),
        ("tools", 0, "must be a list of JSON schemas"),
        ("tools", [{"name": "\ud83d"}], "half a surrogate pair"),
        ("tools", '[{"name": "\\ud83d"}]', "half a surrogate pair"),
        ("tools", [{"\ud83d": 1}], "half a surrogate pair"),
        ("chat_template_kwargs", "a", "text that is not JSON"),
        ("chat_template_kwargs", ["a"], "text that is not JSON"),
        ("chat_template_kwargs", 1, "must be an object of names and values"),
        ("chat_template_kwargs", False, "must be an object of names and values"),
        (
            "chat_template_kwargs",
            {"add_generation_prompt": False},
            "add_generation_prompt is not the row's to choose",
        ),
        (
            "chat_template_kwargs",
            {"chat_template": "a"},
            "chat_template is not the row's to choose",
        ),
        ("chat_template_kwargs", {"messages": []}, "messages is not the row's to choose"),
        ("chat_template_kwargs", {"strftime_now": "a"}, "strftime_now is not the row's to choose"),
        ("chat_template_kwargs", {"tokenize": True}, "tokenize is not the row's to choose"),
        ("chat_template_kwargs", {"mode": "\ud83d"}, "half a surrogate pair"),
    ],
)
def test_tools_and_variables_of_a_wrong_kind(refusal, column, value, said):
    line = refusal(WITH_TOOLS, {"prompt": "a"}, {"prompt": "a", column: value})
    assert line.startswith(f"line 2: column `{column}`") and said in line, line


def test_variables_reach_the_template(load, refusal):
    template = (
        PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}"
    )
    rows = [
        {"prompt": "a", "chat_template_kwargs": v}
        for v in ({"enable_thinking": False}, '{"enable_thinking": true}', None)
    ]
    texts, prompt_set = load(template, *rows)
    assert [text.removeprefix("<user>a<|end|><assistant>") for text in texts] == ["<t></t>", "", ""]
    assert prompt_set.notes == () and prompt_set.summary == "d 3"
    assert "`chat_template_kwargs` needs a chat template" in refusal(None, rows[0])


def test_variables_that_the_template_does_not_mention_are_said(load):
    rows = [{"prompt": "a", "chat_template_kwargs": {"enable_thinkin": False}}] * 2
    assert load(PLAIN, *rows)[1].summary == (
        "d 2; 2 rows set 'enable_thinkin' in `chat_template_kwargs`, which the chat template does "
        "not mention"
    )


def call(arguments) -> dict:
    function = {"name": "weather", "arguments": arguments}
    return turn("assistant", None, tool_calls=[{"type": "function", "function": function}])


@pytest.mark.parametrize("given", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize(
    "wanted",
    [
        "(c.function.arguments | tojson)",
        "(c.function.arguments + '')",
        "(c.function.arguments.items() | list | string)",
    ],
)
def test_arguments_of_tool_calls_in_the_form_that_the_template_takes(load, given, wanted):
    template = WITH_CALLS.replace("ARGUMENTS", wanted)
    texts, _ = load(template, {"prompt": [turn("user", "a"), call(given), turn("tool", "sunny")]})
    written = "[('city', 'Rome')]" if "items" in wanted else '{"city": "Rome"}'
    assert texts == [f"<user>a<assistant>weather={written}<tool>sunny<assistant>"]


def test_a_content_of_null_beside_tool_calls(load, refusal):
    messages = [turn("user", "a"), call({}), turn("tool", "b")]
    absent = [{k: v for k, v in m.items() if v is not None} for m in messages]
    for template in (
        WITH_CALLS.replace("ARGUMENTS", "'1'"),
        # wants an empty text
        "{% for m in messages %}{{ m.content + (m.tool_calls | string) }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
    ):
        texts, _ = load(template, {"prompt": messages}, {"prompt": absent})
        assert texts[0] == texts[1] and "weather" in texts[0] and "None" not in texts[0]
    template = (
        "{% for m in messages %}{{ '[' ~ m.content ~ ']' if 'content' in m else "
        "m.tool_calls[0].type }}{% endfor %}"
    )
    assert load(template, {"prompt": messages})[0] == ["[a]function[b]"]
    assert "every message needs a role and a content" in refusal(
        PLAIN, {"prompt": [turn("user", "a"), turn("tool", None)]}
    )
    assert "leaves out the tool calls of message 2" in refusal(PLAIN, {"prompt": messages})


def test_half_a_surrogate_anywhere_in_a_message(refusal):
    for message in (
        turn("us\ud83der", "a"),
        turn("user", "a", name="\ude00"),
        turn("user", "a", **{"\ud83d": 1}),
    ):
        line = refusal(PLAIN, {"prompt": [message]})
        assert (
            line
            == "line 1: column `prompt`: half a surrogate pair, which is no character; mend the row"
        )


# ---- The end of a turn ---------------------------------------------------------------------------

ANSWER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{{ m.content }}BEHIND{% else "
    "%}<user>{{ m.content }}{% endif %}{% endfor %}"
)


def ends(
    load, template: str | None, *, eos_ids=(EOS, END, TURN), response="yes", prompt="a?"
) -> list[int]:
    _, prompt_set = load(
        template, {"prompt": prompt, "response": response}, need_response=True, eos_ids=eos_ids
    )
    return prompt_set.prompts[0].target_ids


YES = [VOCAB[c] for c in "yes"]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ANSWER.replace("BEHIND", "<|end|>"), END),
        (ANSWER.replace("BEHIND", " \n<turn|>\n\n<eos>"), TURN),
        (ANSWER.replace("BEHIND", "{{ eos_token }}"), EOS),
        (ANSWER.replace("BEHIND", ""), EOS),  # none at all
        (ANSWER.replace("BEHIND", "<pad>"), EOS),  # the sampler does not stop there
        (ANSWER.replace("BEHIND", "{% if not loop.last %}<|end|>{% endif %}"), END),
        (
            ANSWER.replace("BEHIND", "<turn|>").replace(
                "m.content }}<turn|>", "m.content | upper | trim }}<turn|>"
            ),
            TURN,
        ),
        (
            ANSWER.replace(
                "BEHIND", "{{ '<turn|>' if messages[0].role == 'user' else raise_exception('no') }}"
            ),
            TURN,
        ),
        (ANSWER.replace("BEHIND", "{{ raise_exception('no answers') }}"), EOS),
        (PARTS, END),
        (None, EOS),
    ],
)
def test_a_response_ends_as_the_template_ends_a_turn(load, template, end):
    assert ends(load, template) == [*YES, end]


def test_a_conversation_that_may_not_be_answered_does_not_hide_the_end(load):
    template = (
        "{% if messages | length > 1 and messages[0].role != 'user' %}{{ raise_exception('no "
        "question') }}{% endif %}{% for m in messages %}{{ m.content + ('<turn|>' if m.role == "
        "'assistant' else '<|end|>') }}{% endfor %}"
    )
    assert ends(load, template, prompt=[turn("system", "a")]) == [*YES, TURN]


def test_the_end_is_one_that_the_sampler_stops_at(load):
    template = ANSWER.replace("BEHIND", "<|end|>")
    assert ends(load, template, eos_ids=(EOS,)) == [*YES, EOS]
    assert ends(load, template, eos_ids=(TURN,)) == [*YES, TURN]
    assert ends(load, template, eos_ids=()) == [*YES, EOS]
    assert ends(load, None, eos_ids=(TURN, END)) == [*YES, TURN]


@pytest.mark.parametrize("template", [ANSWER.replace("BEHIND", "<|end|>"), None])
@pytest.mark.parametrize("end", ["<eos>", "<|end|>", "<turn|>"])
def test_a_response_that_has_an_end_gets_no_second_one(load, template, end):
    for response in (f"yes{end}", f"yes{end}\n", f"yes{end}{end}", f"yes{end}<eos> "):
        assert ends(load, template, response=response) == [*YES, VOCAB[end]], response
    first = EOS if template is None else END
    assert ends(load, template, response=f"yes{end}s") == [*YES, VOCAB[end], VOCAB["s"], first]
    assert ends(load, template, response="yes\n") == [*YES, VOCAB["\n"], first]


def test_a_response_that_is_cut_has_no_end(load):
    options = {"need_response": True, "eos_ids": (END,), "max_response_tokens": 3}
    _, prompt_set = load(PLAIN, *({"prompt": "a", "response": r} for r in ("yes", "ye")), **options)
    assert [p.target_ids for p in prompt_set.prompts] == [YES, [*YES[:2], END]]


# ---- The date ------------------------------------------------------------------------------------

DATED = "<system>{{ strftime_now('%d %B %Y, %H:%M') }}" + PLAIN


def test_a_template_writes_the_time_that_the_run_began(load):
    day, later = datetime(2024, 2, 29, 23, 59, 58), datetime(2024, 3, 1, 0, 0, 1)
    texts, first = load(DATED, {"prompt": "a"}, moment=day)
    assert (
        texts == ["<system>29 February 2024, 23:59<user>a<|end|><assistant>"]
        and first.moment == day
    )
    assert load(DATED, {"prompt": "a"}, moment=day)[1].content_hash == first.content_hash
    assert load(DATED, {"prompt": "a"}, moment=later)[1].content_hash != first.content_hash
    today = load(DATED, {"prompt": "a"})[1].moment
    assert abs((datetime.now() - today).total_seconds()) < 600


def test_the_time_is_nothing_to_a_template_that_does_not_ask(load):
    assert load(PLAIN, {"prompt": "a"}, moment=datetime(2024, 2, 29))[1].moment is None
