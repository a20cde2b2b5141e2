"""Images of prompt files: where they lie, what is refused, and where a prompt shows them."""

import base64
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from opd.config import DataConfig
from opd.inputs.images import with_images
from opd.inputs.models import load_tokenizer
from opd.inputs.prompts import load_prompts
from opd.ops.pixels import Pixels
from opd.pictures import Picture, PromptImages
from scripts import prepare_data
from tests.support import vision


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    path = tmp_path_factory.mktemp("sees")
    vision.idefics3(path)
    return Pixels(str(path))


@pytest.fixture
def load(pixels, tmp_path):
    """(rows, flags) -> the prompt set of a student that sees."""

    def load(rows, sees=True, **flags):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps({"data_source": "d", **row}) + "\n" for row in rows))
        tokenizer = pixels.processor.tokenizer
        kept = {"placeholder_ids": (pixels.processor.image_token_id,), "pixels": pixels}
        return load_prompts(
            [str(file)],
            tokenizer,
            DataConfig(data=[str(file)], **flags),
            flag="--data",
            **(kept if sees else {}),
        )

    return load


def png(width=32, height=32, mode="RGB", **options) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(values).convert(mode).save(encoded, options.pop("format", "png"), **options)
    return encoded.getvalue()


def animated() -> bytes:
    encoded = io.BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 100, 200)]
    frames[0].save(encoded, "gif", save_all=True, append_images=frames[1:])
    return encoded.getvalue()


GOOD = {
    "png": png(),
    "one column": png(1, 40),
    "one row": png(40, 1),
    "palette": png(mode="P"),
    "alpha": png(mode="RGBA"),
    "grey": png(mode="L"),
    "bits": png(mode="1"),
    "cmyk": png(mode="CMYK", format="jpeg"),
    "webp": png(format="webp"),
}
BAD = {
    "truncated": (png(64, 64)[:-200], "cannot be read"),
    "empty": (b"", "cannot be read"),
    "text": (b"not an image", "cannot be read"),
    "animated": (animated(), "3 frames; only still images"),
    "bomb": (png(8001, 8000, mode="1"), "8001 x 8000 pixels, over 64000000"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_images_of_every_kind_are_read(load, tmp_path, kind):
    (tmp_path / "a.img").write_bytes(GOOD[kind])
    (prompt,) = load([{"prompt": "1<image>2=", "images": ["a.img"]}]).prompts
    (image,) = prompt.images.open()
    assert image.mode == "RGB" and len(prompt.token_ids) == prompt.images.num_tokens


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_one_line_or_a_row_left_out(load, tmp_path, kind):
    content, reason = BAD[kind]
    (tmp_path / "bad.img").write_bytes(content)
    (tmp_path / "good.png").write_bytes(png())
    rows = [{"prompt": "1=", "images": [name]} for name in ("good.png", "bad.img")]
    with pytest.raises(ValueError, match=f"line 2: column `images`: image 1: .*{reason}") as error:
        load(rows)
    assert "\n" not in str(error.value)
    found = load(rows, bad_images="drop")
    assert len(found.prompts) == 1 and "1 rows left out" in found.summary
    with pytest.raises(ValueError, match="--bad_images drop: no row"):
        load(rows[1:], bad_images="drop")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["nowhere.png"], "cannot read .*: No such file"),
        (["."], "cannot read"),
        (["https://example.org/a.png"], "is a URL; download it beside the data, or --allow_urls"),
        (["ftp://example.org/a.png"], "give a path, or a URL of http"),
        ([3], "must be a path, bytes or a struct"),
        ([{"bytes": None, "path": None}], "there is none"),
        (["data:image/png,x"], "a data URI that cannot be read"),
        (["a\0b"], "cannot read"),
    ],
)
def test_what_is_no_image_is_said(load, value, reason):
    with pytest.raises(ValueError, match=rf"line 1: column `images`: image 1: .*{reason}|{reason}"):
        load([{"prompt": "1=", "images": value}])


def test_an_image_may_be_a_path_a_data_uri_or_a_struct(load, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    values = ["a.png", ["a.png"], [str(tmp_path / "a.png")], [uri], [{"path": "a.png"}]]
    found = load([{"prompt": "<image>1=", "images": value} for value in values]).prompts
    (digest,) = {prompt.images.pictures[0].digest for prompt in found}
    assert digest == Picture.of(png()).digest
    assert len({tuple(prompt.token_ids) for prompt in found}) == 1


def test_structs_of_a_column_store(pixels, tmp_path):
    table = pyarrow.table(
        {
            "data_source": ["d", "d"],
            "prompt": ["<image>1=", "2="],
            "images": [[{"bytes": png(), "path": None}], None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = load_prompts(
        [str(tmp_path / "a.parquet")],
        pixels.processor.tokenizer,
        DataConfig(),
        flag="--data",
        pixels=pixels,
        placeholder_ids=(pixels.processor.image_token_id,),
    ).prompts
    assert found[0].images.pictures[0].source == png() and found[1].images is None


def test_a_picture_is_upright(tmp_path):
    """As `load_image` of transformers turns it."""
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    turned = png(40, 20, format="jpeg", exif=exif)
    assert Picture.of(turned).open().size == (20, 40)


@pytest.mark.parametrize(
    ("content", "count", "expected"),
    [
        ("a<image>b", 1, ["a", None, "b"]),
        ("ab", 1, [None, "ab"]),
        ("ab", 2, [None, None, "ab"]),
        ("<image><image>", 2, [None, None]),
        ([{"type": "text", "text": "a"}, {"type": "image"}], 1, ["a", None]),
    ],
)
def test_where_images_are_shown(content, count, expected):
    (message,) = with_images("row", [{"role": "user", "content": content}], count, "images")
    assert [part.get("text") for part in message["content"]] == expected


@pytest.mark.parametrize("content", ["a<image>b<image>", [{"type": "image"}] * 2])
def test_a_prompt_shows_as_many_images_as_its_row_has(load, tmp_path, content):
    (tmp_path / "a.png").write_bytes(png())
    row = {"prompt": [{"role": "user", "content": content}], "images": ["a.png"]}
    with pytest.raises(ValueError, match=r"shows 2 images .* column `images` has 1"):
        load([row])


def test_placeholders_without_images_are_refused(load):
    """A model would look for an image in their place."""
    with pytest.raises(ValueError, match=r"line 1: the prompt shows 1 images .* has 0$"):
        load([{"prompt": "1<image>2="}])
    for frame in ("<fake_token_around_image>", "<global-img>"):
        assert load([{"prompt": f"1{frame}2="}]).prompts, "these frame images, and show none"


def test_a_student_that_sees_nothing_is_given_no_image(load, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match="line 2: column `images` has an image, and the student"):
        load([{"prompt": "1="}, {"prompt": "2=", "images": ["a.png"]}], sees=False)
    assert len(load([{"prompt": "1=", "images": None}], sees=False).prompts) == 1


def test_a_long_prompt_with_an_image_is_never_cut(load, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"prompt": "1=", "images": ["a.png"]}, {"prompt": "123456789="}]
    found = load(rows, max_prompt_tokens=6, overlong_prompts="truncate")
    assert [prompt.images for prompt in found.prompts] == [None] and found.overlong == {"d": 2}


def test_the_content_of_images_is_part_of_the_data(load, tmp_path):
    rows = [{"prompt": "1=", "images": ["a.png"]}]
    hashes = set()
    for shade in (0, 0, 1):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / "a.png")
        hashes.add(load(rows).content_hash)
    assert len(hashes) == 2


def test_images_travel_as_json_and_back(pixels):
    _, images = vision.prompt_images(pixels, "1{}2{}=", vision.picture(1), vision.picture(2))
    assert PromptImages.from_json(json.loads(json.dumps(images.to_json()))) == images


def test_the_tokenizer_of_a_student_that_sees(tmp_path):
    vision.idefics3(tmp_path)
    assert load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<image>") >= 0


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
@pytest.mark.parametrize("none", [{}, {"images": []}, {"images": None}, {"image": ["a.png"]}])
def test_a_text_that_shows_an_image_has_one(family, none, tmp_path):
    """Whatever the family's own placeholder is: a column of another name would train it blind."""
    vision.FAMILIES[family](tmp_path / "model")
    pixels = Pixels(str(tmp_path / "model"))
    file = tmp_path / "data.jsonl"

    def loaded(row):
        file.write_text(json.dumps({"data_source": "d", **row}) + "\n")
        tokenizer, cfg = pixels.processor.tokenizer, DataConfig(data=[str(file)])
        return load_prompts([str(file)], tokenizer, cfg, flag="--data", pixels=pixels).prompts

    with pytest.raises(ValueError, match=r"line 1: the prompt shows 1 images .* has 0$"):
        loaded({"prompt": "<image>=", **none})
    (prompt,) = loaded({"prompt": "1=", **none})
    assert prompt.images is None


@pytest.mark.parametrize("nothing", [{"bytes": None, "path": None}, {}])
def test_a_struct_of_nulls_is_no_image(load, nothing):
    (prompt,) = load([{"prompt": "1=", "images": nothing}]).prompts
    assert prompt.images is None
    rows = [{"prompt": "1=", "images": [nothing]}, {"prompt": "2="}]
    with pytest.raises(ValueError, match="line 1: column `images`: image 1: there is none"):
        load(rows)
    assert len(load(rows, bad_images="drop").prompts) == 1


def test_a_photo_with_a_second_frame_beside_it_is_one_photo():
    """As phones write them; an animation stays refused."""
    frames, encoded = [Image.new("RGB", (30, 20), shade) for shade in ("red", "blue")], io.BytesIO()
    frames[0].save(encoded, "MPO", save_all=True, append_images=frames[1:])
    picture = Picture.of(encoded.getvalue())
    picture.check()
    assert picture.open().getpixel((5, 5))[0] > 200
    encoded = io.BytesIO()
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 frames"):
        Picture.of(encoded.getvalue()).check()


def test_geometry3k_is_converted(tmp_path, load):
    """From structs with bytes, as the published parquet file has them."""
    table = pyarrow.table(
        {
            "images": [[{"bytes": png(20 + i, 30), "path": None}] for i in range(30)],
            "problem": ["<image>Find x."] * 30,
            "answer": [str(i) for i in range(30)],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "source.parquet")
    command = ["geometry3k", "--source", str(tmp_path / "source.parquet")]
    assert (
        prepare_data.main([*command, "--output_dir", str(tmp_path), "--eval_fraction", "0.3"]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert len(rows) + len(held_out) == 30 and min(len(rows), len(held_out)) > 3
    assert Picture.of(str(tmp_path / rows[0]["images"][0])).open().height == 30
    assert rows[0]["prompt"][0]["content"].startswith("<image>Find x.")


def test_a_row_of_geometry3k_without_an_image_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "p", "answer": "1"}) + "\n")
    command = ["geometry3k", "--source", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path)]
    assert prepare_data.main(command) == 2
    assert "line 1: column `images` has no image" in capsys.readouterr().err
