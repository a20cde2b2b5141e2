"""The images of a row: where they are, whether they can be read, and where a prompt shows them."""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from opd.inputs.columns import checked_value
from opd.log import cut, one_line
from opd.pictures import Picture

MARKER = "<image>"  # in the text of a message: an image stands here
URL_TIMEOUT_S, MOST_URL_BYTES = 30.0, 64 << 20


class BadImage(ValueError):
    """An image that no model could read; `--bad_images drop` leaves its row out."""


def read_pictures(
    where: str, folder: Path, row: dict[str, Any], key: str, allow_urls: bool
) -> tuple[Picture, ...]:
    """The images of a row, each decoded once; none where the column is absent or empty.

    A value is an image or a list of them, and an image a path (relative to `folder`), bytes, a
    struct of a column store with either, or a data URI. BadImage for one that cannot be read,
    ValueError for what is none.
    """
    value = checked_value(where, row, key)
    values = value if isinstance(value, list | tuple) else [value]
    values = [] if value in (None, "", []) or _is_nothing(value) else values
    found = []
    for number, item in enumerate(values, 1):
        at = f"{where}: column `{key}`: image {number}"
        picture = _picture(at, folder, item, allow_urls)
        try:
            picture.check()
        except ValueError as error:
            raise BadImage(f"{at}: {error}") from None
        found.append(picture)
    return tuple(found)


def _is_nothing(item: Any) -> bool:
    """What a column store writes for no image: a struct whose fields are null."""
    return isinstance(item, dict) and not any(item.values())


def _picture(at: str, folder: Path, item: Any, allow_urls: bool) -> Picture:
    if isinstance(item, Image.Image):  # a hub data set has decoded it
        encoded = io.BytesIO()
        item.save(encoded, "png")
        return Picture.of(encoded.getvalue())
    if isinstance(item, dict):
        inside = next((item[k] for k in ("bytes", "path", "image", "url") if item.get(k)), None)
        if inside is not None and not isinstance(inside, dict):
            return _picture(at, folder, inside, allow_urls)
    if isinstance(item, bytes):
        return Picture.of(item)
    if item is None or _is_nothing(item):
        raise BadImage(f"{at}: there is none")
    if not isinstance(item, str) or not item:
        raise ValueError(f"{at} must be a path, bytes or a struct with either, got {cut(item)}")
    if item.startswith("data:"):
        return Picture.of(_of_data_uri(at, item))
    if item.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(
                f"{at}: {cut(item)} is a URL; download it beside the data, or --allow_urls"
            )
        return Picture.of(_downloaded(at, item))
    if "://" in item:
        raise ValueError(f"{at}: {cut(item)}: give a path, or a URL of http")
    path = folder / Path(item).expanduser()
    try:
        return Picture.of(str(path))
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise BadImage(f"{at}: cannot read {cut(str(path))}: {reason}") from None


def _of_data_uri(at: str, uri: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadImage(f"{at}: a data URI that cannot be read: {one_line(error)}") from None


def _downloaded(at: str, url: str) -> bytes:
    content = bytearray()
    try:
        with httpx.stream("GET", url, timeout=URL_TIMEOUT_S, follow_redirects=True) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MOST_URL_BYTES:
                    raise BadImage(f"{at}: {cut(url)}: over {MOST_URL_BYTES >> 20} MiB")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BadImage(f"{at}: {cut(url)}: {one_line(error)}") from None
    return bytes(content)


def with_images(
    where: str, messages: list[dict[str, Any]], count: int, key: str
) -> list[dict[str, Any]]:
    """The messages with a part for each of `count` images, in the form of models that see.

    A part `image` or the text `<image>` says where; without either they come first in the last
    message of the user.
    """
    placed = [{**m, "content": _split(m["content"])} if "content" in m else m for m in messages]
    places = sum(part["type"] == "image" for m in placed for part in parts_of(m))
    if places == 0 and count:
        last = max((i for i, m in enumerate(placed) if m["role"] == "user"), default=None)
        if last is None:
            raise ValueError(f"{where}: column `{key}`: no message of the user to show an image in")
        placed[last] = {
            **placed[last],
            "content": [{"type": "image"}] * count + placed[last]["content"],
        }
        places = count
    if places != count:
        raise ValueError(
            f"{where}: the prompt shows {places} images ({MARKER}, or parts of type image), column "
            f"`{key}` has {count}"
        )
    return placed


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of its content; none of one that is text, or absent."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def _split(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "image":
            parts.append({"type": "image"})
            continue
        for number, text in enumerate(part["text"].split(MARKER)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
    return parts
