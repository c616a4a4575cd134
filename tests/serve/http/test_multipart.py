"""Forms are parsed exactly, and malformed forms are refused in one line."""

import random

import pytest

from trtq.serve.http.errors import ApiError
from trtq.serve.http.multipart import parse_form

TYPE = "multipart/form-data; boundary=edge"


def form(*parts, boundary=b"edge"):
    """A form of these parts, each a head and a content."""
    pieces = [b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, content) for head, content in parts]
    return b"".join(pieces) + b"--%b--\r\n" % boundary


def head(name, more=""):
    return f'Content-Disposition: form-data; name="{name}"{more}'.encode()


@pytest.mark.parametrize(
    "content", [b"", b"\r\n", b"\r\n--edg", b"x--edge", b"\n--edge\n", b"\0\xff", b"a\r\n\r\nb"]
)
def test_the_content_of_a_field_is_kept_byte_for_byte(content):
    (first, second) = parse_form(TYPE, form((head("a"), content), (head("b"), b"x")))
    assert (first.name, first.content) == ("a", content)
    assert (second.name, second.content) == ("b", b"x")


def test_file_names_and_further_headers_are_accepted():
    more = '; filename="näh \\"1\\".png"\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: binary'
    (part,) = parse_form(
        'Multipart/Form-Data; boundary="edge"', form((head("image[]", more), b"x"))
    )
    assert (part.name, part.content) == ("image[]", b"x")


def test_a_field_that_is_no_text_is_refused_when_it_is_read_as_text():
    (part,) = parse_form(TYPE, form((head("prompt"), b"\xff")))
    with pytest.raises(ApiError, match="'prompt' contains characters that are not text"):
        _ = part.text


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("multipart/form-data", form(), "must name its boundary"),
        ("multipart/form-data; boundary=", form(), "must name its boundary"),
        (f"multipart/form-data; boundary={'x' * 71}", form(), "must name its boundary"),
        ("multipart/form-data; boundary=é", form(), "must name its boundary"),
        (TYPE, b"", "must begin with the boundary"),
        (TYPE, b"hello", "must begin with the boundary"),
        (TYPE, b"preamble\r\n" + form(), "must begin with the boundary"),
        (TYPE, form((head("a"), b"x"))[:-4], "its end is missing"),
        (TYPE, form((head("a"), b"x")) + b"more", "its end is missing"),
        (TYPE, form(*[(head("a"), b"")] * 65), "up to 64 fields"),
        (TYPE, form((b"X: " + b"x" * 9000, b"")), "a head of up to 8192 bytes"),
        (TYPE, b"--edge\r\nno empty line\r\n--edge--", "an empty line"),
        (TYPE, b"--edged\r\n\r\n\r\n--edge--", "an empty line"),
        (TYPE, form((b"no colon", b"")), "lines NAME: VALUE"),
        (TYPE, form((head("a", "; name=b"), b"")), "write parameters as"),
        (TYPE, form((head('a"; x'), b"")), "write parameters as"),
        (TYPE, form((b"Content-Type: text/plain", b"")), "Content-Disposition: form-data"),
        (TYPE, form((b"Content-Disposition: form-data", b"")), "with its name"),
        (TYPE, form((b'Content-Disposition: file; name="a"', b"")), "Content-Disposition"),
        (TYPE, form((head("a", "\r\nContent-Transfer-Encoding: base64"), b"")), "as they are"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_form_is_refused_in_one_line(content_type, body, message):
    with pytest.raises(ApiError, match=message) as refused:
        parse_form(content_type, body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_form")
    assert "\n" not in refused.value.message


def test_any_bytes_are_a_form_or_a_400():
    generator = random.Random(0)
    pieces = [
        b"--edge",
        b"--",
        b"\r\n",
        b"; name*0*=u''%ff",
        b"; name*1=x",
        head("a"),
        b":",
        b"\0",
        b"\xff",
        b"x",
    ]
    for _ in range(2000):
        data = b"".join(generator.choices(pieces, k=generator.randrange(12)))
        for body in (data, form((head("a"), data)), b"--edge\r\n" + data + b"\r\n--edge--"):
            try:
                parse_form(TYPE, body)
            except ApiError as error:
                assert error.status == 400  # noqa: PT017
