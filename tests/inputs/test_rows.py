"""Files and values of every kind: each is read as it is meant, or refused in one line."""

import codecs
import datetime as dt
import json
import random
import uuid
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.inputs.rows import read_rows
from tests.support.prompts import ids, load, row, write

ROWS = [row("a", answer="1"), row("b", answer="2")]


def refused(path, **options) -> str:
    """The one line with which a file is refused, without flag and path."""
    with pytest.raises(ValueError) as caught:
        load(str(path), **options)
    line = str(caught.value)
    assert line.startswith(f"--data {path}") and "\n" not in line, line
    return line.removeprefix(f"--data {path}")


def parquet(path, **columns) -> str:
    """A file with two rows, of which only `columns` are given."""
    usual = {"data_source": ["m", "m"], "prompt": ["a", "b"]}
    pq.write_table(pa.table({**usual, **columns}), path)
    return str(path)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("space", [b"", b" \r\n\t\n"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_marks_and_space_before_the_first_row(tmp_path, mark, space, name):
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in ROWS)
    (tmp_path / name).write_bytes(mark + space + lines)
    assert [p.answer for p in load(str(tmp_path / name)).prompts] == ["1", "2"]
    (tmp_path / "list.json").write_bytes(mark + space + json.dumps(ROWS, indent=2).encode() + space)
    assert [p.answer for p in load(str(tmp_path / "list.json")).prompts] == ["1", "2"]


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_other_encodings_are_named(tmp_path, encoding, name):
    (tmp_path / name).write_text(json.dumps(ROWS), encoding=encoding)
    line = refused(tmp_path / name)
    assert encoding.upper() in line and "save it as UTF-8" in line


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.json", "list.json", "blank.jsonl", "mark.json", "folder"]
)
def test_no_rows(tmp_path, capfd, name):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "list.json").write_text(" [ ] ")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "mark.json").write_bytes(codecs.BOM_UTF8)
    for empty in ("a.jsonl", "a.json"):
        (tmp_path / empty).touch()
    (tmp_path / "folder").mkdir()
    pq.write_table(
        pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "folder" / "a.parquet"
    )
    (tmp_path / "folder" / "b.jsonl").touch()
    assert refused(tmp_path / name) == ": empty, no rows"
    assert capfd.readouterr() == ("", "")


def test_a_part_of_a_directory_may_be_empty(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", ROWS)
    assert len(load(str(tmp_path)).prompts) == 2


def test_files_that_are_not_what_they_are_called(tmp_path, capfd):
    whole = (tmp_path / "whole.parquet", tmp_path / "other.parquet")
    parquet(whole[0])
    content = whole[0].read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    cases = {
        "empty.parquet": (b"", "not a parquet file"),
        "magic.parquet": (b"PARX" + content[4:-4] + b"PARX", "not a parquet file"),
        "short.parquet": (content[:-20], "not a parquet file"),
        "torn.parquet": (content[:4] + b"\xff" * 60 + content[64:], "not a parquet file"),
        "text.parquet": (b'{"prompt": "a"}\n', "not a parquet file"),
        "pointer.parquet": (pointer, "a git-lfs pointer"),
        "pointer.jsonl": (pointer, "a git-lfs pointer"),
        "zipped.jsonl": (b"\x1f\x8b\x08\x08" + bytes(range(200)), "line 1: not JSON"),
        "a.jsonl.gz": (b"\x1f\x8b\x08\x08", "unknown file type '.gz'"),
        "list.jsonl": (json.dumps(ROWS, indent=1).encode(), "line 1: not JSON"),
        "row.json": (b'[{"prompt": "a"}, 7]', "row 2: expected an object with columns, got int"),
        "deep.json": (b"[" * 100_000, "not JSON"),
        "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
        "digits.jsonl": (b'{"prompt": ' + b"1" * 10_000 + b"}", "line 1: not JSON"),
        "digits.json": (b'[{"prompt": ' + b"1" * 10_000 + b"}]", "not JSON"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert said in refused(tmp_path / name), name
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), whole[1])
    assert "two columns called prompt" in refused(whole[1])
    assert capfd.readouterr() == ("", "")


def test_any_damage_to_a_parquet_file_is_one_line_or_none(tmp_path):
    """Bytes may change in a text, which nothing notices; whatever is noticed names the file."""
    path, rng = tmp_path / "a.parquet", random.Random(0)
    parquet(path, answer=[1.5, None])
    content = path.read_bytes()
    noticed = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]))
        try:
            load(str(path))
        except ValueError as error:
            noticed += 1
            assert str(error).startswith("--data") and "\n" not in str(error)
    assert noticed > 100


# ---- Values --------------------------------------------------------------------------------------

SECOND = dt.datetime(2024, 2, 29, 12, 30, 1)
TEXTS = {
    "decimal": (
        pa.array([Decimal("72.50"), Decimal("-1000.00")], pa.decimal128(20, 2)),
        "72.50",
        "-1000.00",
    ),
    "wide decimal": (
        pa.array([Decimal("1e30"), Decimal(0)], pa.decimal256(60, 3)),
        f"1{'0' * 30}.000",
        "0.000",
    ),
    "small decimal": (
        pa.array([Decimal(0), Decimal("1e-10")], pa.decimal128(20, 10)),
        "0.0000000000",
        "0.0000000001",
    ),
    "date": (pa.array([SECOND.date(), dt.date(1, 1, 1)]), "2024-02-29", "0001-01-01"),
    "datetime": (
        pa.array([SECOND, SECOND], pa.timestamp("ms")),
        "2024-02-29T12:30:01",
        "2024-02-29T12:30:01",
    ),
    "nanoseconds": (
        pa.array([1, 10**9], pa.timestamp("ns")),
        "1970-01-01T00:00:00.000000001",
        "1970-01-01T00:00:01",
    ),
    "zone": (
        pa.array([0, 0], pa.timestamp("s", "Asia/Tokyo")),
        "1970-01-01T09:00:00+09:00",
        "1970-01-01T09:00:00+09:00",
    ),
    "time": (pa.array([SECOND.time(), dt.time(0)]), "12:30:01", "00:00:00"),
    "duration": (pa.array([9000, 90061], pa.duration("s")), "2:30:00", "1 day, 1:01:01"),
    "fine duration": (
        pa.array([9 * 10**12, 10**3], pa.duration("ns")),
        "2:30:00",
        "0:00:00.000001",
    ),
    "bytes": (pa.array([b"seven", "ü".encode()]), "seven", "ü"),
    "uuid": (
        pa.array([uuid.UUID(int=7).bytes] * 2, pa.uuid()),
        str(uuid.UUID(int=7)),
        str(uuid.UUID(int=7)),
    ),
    "whole floats": (pa.array([72.0, -0.0]), "72", "0"),
    "floats": (pa.array([0.5, 1e300]), "0.5", "1e+300"),
    "half floats": (pa.array([0.5, 3.0], pa.float16()), "0.5", "3"),
    "large whole numbers": (pa.array([2**63, 2**53 + 1], pa.uint64()), str(2**63), str(2**53 + 1)),
    "bool": (pa.array([True, False]), "true", "false"),
    "dictionary": (pa.array(["x", "y"]).dictionary_encode(), "x", "y"),
    "list": (pa.array([[1, None], []], pa.list_(pa.int64())), "[1, null]", "[]"),
    "struct": (
        pa.array([{"d": Decimal("1.50"), "at": dt.date(2024, 1, 1)}] * 2),
        *['{"d": "1.50", "at": "2024-01-01"}'] * 2,
    ),
    "map": (pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), '{"k": 1}', "{}"),
    "json": (pa.array(['{"k": [1]}', "7"], pa.json_()), '{"k": [1]}', "7"),
    "view": (pa.array(["x", "y"], pa.string_view()), "x", "y"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_answers_of_every_type(tmp_path, kind):
    column, *texts = TEXTS[kind]
    path = parquet(tmp_path / "a.parquet", answer=column)
    assert [p.answer for p in load(path, need_answer=True).prompts] == texts
    assert [p.answer for p in load(path).prompts] == texts
    if not texts[0].startswith(("{", "[")):
        assert sorted(load(parquet(tmp_path / "d.parquet", data_source=column)).domains) == sorted(
            {text.capitalize() if kind == "bool" else text for text in texts}
        )


BROKEN_TEXT = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa")]
)
NO_TEXT = {
    "bytes that are no text": (pa.array([b"\xff\xfe", b"a"]), "are not UTF-8"),
    "nan": (pa.array([float("nan"), 1.0]), "nan is no value"),
    "infinity": (pa.array([float("-inf"), 1.0]), "-inf is no value"),
    "text that is not UTF-8": (BROKEN_TEXT, "cannot be read: 'utf-8' codec"),
    "a zone that there is not": (
        pa.array([0, 0], pa.timestamp("s", "Mars/Olympus")),
        "cannot be read",
    ),
    "a year after 9999": (pa.array([2**52, 0], pa.timestamp("ms")), "cannot be read"),
    "a duration of ages": (pa.array([2**52, 0], pa.duration("s")), "cannot be read"),
    "json that is none": (pa.array(["{", "1"], pa.json_()), "cannot be read"),
    "nan in a list": (pa.array([[float("nan")], []]), "JSON compliant"),
    "bytes in a struct": (pa.array([{"b": b"\xff"}, None]), "are not UTF-8"),
    "keys that are no text": (
        pa.array([[(b"k", 1)], []], pa.map_(pa.binary(), pa.int64())),
        "keys must be str",
    ),
    "keys that occur twice": (
        pa.array([[("k", 1), ("k", 2)], []], pa.map_(pa.string(), pa.int64())),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_answers_without_a_text_are_refused_where_they_are_needed(tmp_path, kind):
    column, said = NO_TEXT[kind]
    path = parquet(tmp_path / "a.parquet", answer=column)
    assert load(path).prompts[0].answer is None
    line = refused(path, need_answer=True)
    assert line.startswith(", row 1: column `answer`") and said in line, line
    path = parquet(tmp_path / "d.parquet", data_source=column)
    assert ", row 1: column `data_source`" in refused(path)
    for name, options in (("prompt", {}), ("response", {"need_response": True})):
        line = refused(parquet(tmp_path / "p.parquet", **{name: column}), **options)
        assert line.startswith(f", row 1: column `{name}`"), line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("nan")]])
def test_numbers_that_json_does_not_have(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [row(answer=value)])
    assert load(path).prompts[0].answer is None
    assert "line 1: column `answer`: " in refused(path, need_answer=True)


def test_a_whole_number_names_one_domain(tmp_path):
    """A column store with a missing value turns 3 into 3.0."""
    path = write(
        tmp_path / "a.jsonl", [row(domain=3), row(domain=3.0), row(domain="3"), row(domain=3e0)]
    )
    assert load(path).counts == {"3": 4}
    path = parquet(tmp_path / "a.parquet", data_source=pa.array([1.0, None]))
    assert ", row 2: column `data_source` is null" in refused(path)
    path = parquet(tmp_path / "a.parquet", data_source=pa.array([1, 2**60]))
    assert load(path).domains == ("1", str(2**60))
    for nothing in ([], {}, "", " ", None, float("nan")):
        assert "column `data_source`" in refused(write(tmp_path / "b.jsonl", [row(domain=nothing)]))


@pytest.mark.parametrize("escape", ["\\ud83d", "\\ude00", "\\ud83d\\ud83d", "\\ude00\\ud83d"])
@pytest.mark.parametrize("column", ["prompt", "data_source", "answer", "response"])
def test_half_a_surrogate_pair_is_refused_where_it_is_used(tmp_path, column, escape):
    good = '{"data_source": "m", "prompt": "a", "answer": "b", "response": "c"}'
    needs = {"need_answer": True, "need_response": True}
    for text in (f"x{escape}", f"{escape} "):
        path = write(
            tmp_path / "a.jsonl",
            [good, json.dumps(json.loads(good) | {column: "HERE"}).replace("HERE", text)],
        )
        assert refused(path, **needs).startswith(
            f", line 2: column `{column}`: half a surrogate pair"
        )
    if column in ("answer", "response"):
        assert len(load(path).prompts) == 2
    nested = json.dumps(json.loads(good) | {"answer": {"k": ["HERE"]}}).replace("HERE", escape)
    assert "column `answer`: half" in refused(
        write(tmp_path / "b.jsonl", [nested]), need_answer=True
    )


def test_whole_surrogate_pairs_and_nul_are_characters(tmp_path):
    line = '{"data_source": "m\\u0000", "prompt": "a\\u0000", "answer": "\\ud83d\\ude00", "response": "\\u0000"}'  # noqa: E501
    (prompt,) = load(
        write(tmp_path / "a.jsonl", [line]), need_answer=True, need_response=True
    ).prompts
    assert (prompt.domain, prompt.answer) == ("m\0", "\U0001f600") and prompt.target_ids == ids(
        "\0<eos>"
    )


def test_what_lies_too_deep_is_refused(tmp_path):
    deep = "[" * 300 + "]" * 300
    path = write(tmp_path / "a.jsonl", [row(answer=json.loads(deep))])
    assert load(path).prompts[0].answer is None
    assert "more than 100 lists and objects inside each other" in refused(path, need_answer=True)
    for column in ("prompt", "tools", "chat_template_kwargs", "data_source"):
        path = write(tmp_path / "a.jsonl", [row() | {column: json.loads(deep)}])
        assert "inside each other" in refused(path)
    assert "inside each other" in refused(write(tmp_path / "a.jsonl", [row(tools=deep)]))


# ---- Anything ------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "prompt",
        "data_source",
        "answer",
        "response",
        "tools",
        "chat_template_kwargs",
        "role",
        "content",
        "tool_calls",
        "name",
        "x",
    ]
)
TEXT = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["user", "assistant", "a", "[]", "{}", "[{}]", "null", "<eos>"]
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUE = st.recursive(
    LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4), max_leaves=8
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": TEXT | st.none(),
        },
        optional={"tool_calls": VALUE, "name": VALUE},
    ),
    max_size=3,
)
ROW = st.fixed_dictionaries(
    {"prompt": MESSAGES | TEXT | VALUE, "data_source": TEXT | VALUE},
    optional={
        "answer": VALUE,
        "response": TEXT | VALUE,
        "tools": VALUE,
        "chat_template_kwargs": VALUE,
        "x": VALUE,
    },
)
SETTINGS = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_line_or_none(path, **needs) -> None:
    try:
        prompts = load(str(path), **needs).prompts
    except ValueError as error:
        assert str(error).startswith(f"--data {path}") and "\n" not in str(error), error
    else:
        assert all(p.token_ids and p.domain.strip() for p in prompts)
        assert all(type(p.answer) is str for p in prompts if needs["need_answer"])


@SETTINGS
@given(st.lists(ROW, max_size=2), st.booleans())
def test_any_json_rows_are_read_or_refused_in_one_line(tmp_path, rows, needs):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    one_line_or_none(path, need_answer=needs, need_response=needs)


@SETTINGS
@given(st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.parquet"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    one_line_or_none(tmp_path / name, need_answer=False, need_response=False)


ARROW = st.sampled_from(
    [
        *(c for c, *_ in TEXTS.values()),
        *(c for c, _ in NO_TEXT.values()),
        pa.nulls(2),
        pa.array(["a", "b"]),
    ]
)


@SETTINGS
@given(st.dictionaries(KEYS, ARROW), st.booleans())
def test_any_columns_of_arrow_are_read_or_refused_in_one_line(tmp_path, columns, needs):
    one_line_or_none(
        parquet(tmp_path / "a.parquet", **columns), need_answer=needs, need_response=needs
    )


def test_a_map_an_object_and_json_are_alike(tmp_path):
    message = {"role": "user", "content": "a"}
    columns = {
        "struct": pa.array([[message]] * 2),
        "map": pa.array([[list(message.items())]] * 2, pa.list_(pa.map_(pa.string(), pa.string()))),
        "json": pa.array([json.dumps([message])] * 2, pa.json_()),
        "list of json": pa.ListArray.from_arrays(
            [0, 1, 2],
            pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(message)] * 2)),
        ),
    }
    for kind, column in columns.items():
        rows = read_rows([parquet(tmp_path / "a.parquet", prompt=column)], "--data")
        assert [r["prompt"] for _, r in rows] == [[message]] * 2, kind
