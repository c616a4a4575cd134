"""A strict parser for `multipart/form-data` (RFC 7578), of a body that is in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtq.serve.http.errors import ApiError, printable

__all__ = ["FORM_TYPE", "FormPart", "parse_form"]

FORM_TYPE = "multipart/form-data"
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_PARAMETER = re.compile(r"""\s*;\s*([\w!#$%&'*+.^`|~-]+)=("(?:[^"\\]|\\.)*"|[^\s";]*)""")
_ESCAPED = re.compile(r"\\(.)")
_MAX_PARTS = 64
_MAX_HEAD = 8 << 10
_ENCODINGS = ("", "7bit", "8bit", "binary")


@dataclass(frozen=True)
class FormPart:
    """One field of a form.

    Attributes:
        name: name of the field.
        content: value of the field.
    """

    name: str
    content: bytes

    @property
    def text(self) -> str:
        """The value as text.

        Raises:
            ApiError: 400, the value is not UTF-8.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError as err:
            shown = printable(self.name)
            message = f"{shown!r} contains characters that are not text"
            raise ApiError(400, "invalid_value", message, param=shown) from err


def parse_form(content_type: str, body: bytes) -> list[FormPart]:
    """The fields of a form, in their order.

    Args:
        content_type: the header `Content-Type`, with the boundary.
        body: body of the request.

    Raises:
        ApiError: 400, the body is not a form, or has too many fields.
    """
    delimiter = b"\r\n--" + _boundary(content_type)
    preamble, *pieces = (b"\r\n" + body).split(delimiter, _MAX_PARTS + 1)
    if preamble or not pieces:
        raise _malformed("it must begin with the boundary that Content-Type names")
    if len(pieces) > _MAX_PARTS:
        raise _malformed(f"it may have up to {_MAX_PARTS} fields")
    *fields, end = pieces
    if end.rstrip(b"\r\n") != b"--":
        raise _malformed("its end is missing")
    return [_part(field) for field in fields]


def _boundary(content_type: str) -> bytes:
    boundary = _parameters(content_type)[1].get("boundary", "")
    if _BOUNDARY.fullmatch(boundary) is None:
        raise _malformed("Content-Type must name its boundary, of up to 70 characters")
    return boundary.encode()


def _part(piece: bytes) -> FormPart:
    head, separator, content = piece.partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"\r\n") or len(head) > _MAX_HEAD:
        raise _malformed(f"each field needs a head of up to {_MAX_HEAD} bytes and an empty line")
    headers: dict[str, str] = {}
    for line in head.removeprefix(b"\r\n").decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(":")
        if not colon or not name or "\n" in value or "\r" in value:
            raise _malformed("the head of a field must consist of lines NAME: VALUE")
        headers[name.lower()] = value.strip()
    disposition, parameters = _parameters(headers.get("content-disposition", ""))
    if disposition != "form-data" or "name" not in parameters:
        raise _malformed("each field needs 'Content-Disposition: form-data' with its name")
    if headers.get("content-transfer-encoding", "").lower() not in _ENCODINGS:
        raise _malformed("fields are sent as they are, without Content-Transfer-Encoding")
    return FormPart(parameters["name"], content)


def _parameters(header: str) -> tuple[str, dict[str, str]]:
    """`form-data; name="a"` -> ("form-data", {"name": "a"}).

    Raises:
        ApiError: 400, the header is malformed.
    """
    value, semicolon, rest = header.partition(";")
    text, place = semicolon + rest, 0
    parameters: dict[str, str] = {}
    while text[place:].strip():
        match = _PARAMETER.match(text, place)
        if match is None or match[1].lower() in parameters:
            raise _malformed("a header of the form is malformed; write parameters as ; NAME=VALUE")
        given = match[2]
        quoted = given.startswith('"')
        parameters[match[1].lower()] = _ESCAPED.sub(r"\1", given[1:-1]) if quoted else given
        place = match.end()
    return value.strip().lower(), parameters


def _malformed(reason: str) -> ApiError:
    return ApiError(400, "invalid_form", f"the body is not {FORM_TYPE}: {reason}")
