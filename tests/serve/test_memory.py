"""File mappings are replaced with anonymous memory at the same addresses."""

import mmap
import os
import threading

import numpy as np
import pytest

from trtq.errors import ArtefactError
from trtq.serve import memory
from trtq.serve.memory import copy_mapped_files, mapped_files

SIZE = 3 * mmap.PAGESIZE + 100


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_COPY], ids=["shared", "private"])
@pytest.mark.parametrize("part", [mmap.PAGESIZE, 64 << 20], ids=["in parts", "at once"])
def test_content_and_address_stay_when_the_file_is_truncated(file, monkeypatch, access, part):
    monkeypatch.setattr(memory, "_PART", part)
    before, content = mapped_files(), file.read_bytes()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=access) as mapped:
        values = np.frombuffer(mapped, np.uint8)
        address = values.ctypes.data
        assert str(file) in mapped_files()
        assert copy_mapped_files(before) == 4 * mmap.PAGESIZE
        assert str(file) not in mapped_files()
        os.truncate(file, 0)
        assert (values.tobytes(), values.ctypes.data) == (content, address)
        if access == mmap.ACCESS_COPY:
            mapped[0] = 7
            assert values[0] == 7
        del values


def test_a_concurrent_reader_always_reads_the_same_content(file):
    before = mapped_files()
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        done, wrong = threading.Event(), []
        total = sum(mapped[:])

        def read():
            while not done.is_set():
                if sum(mapped[:]) != total:
                    wrong.append(1)

        thread = threading.Thread(target=read)
        thread.start()
        copy_mapped_files(before)
        done.set()
        thread.join()
        assert not wrong


def test_earlier_and_writable_mappings_are_not_changed(file):
    with file.open("r+b") as opened:
        with mmap.mmap(opened.fileno(), 0) as written:
            copy_mapped_files(set())
            written[0] = 65
            written.flush()
            assert file.read_bytes()[0] == 65
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
            copy_mapped_files(mapped_files())
            assert str(file) in mapped_files()


def test_a_truncated_file_is_named(file):
    before = mapped_files()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        os.truncate(file, 10)
        with pytest.raises(ArtefactError, match=f"{file} was cut short"):
            copy_mapped_files(before)


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_the_mapping_of_a_missing_file_is_copied_unchanged(file, replaced):
    before, content = mapped_files(), file.read_bytes()
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        file.unlink()
        if replaced:
            file.write_bytes(b"short")
        assert copy_mapped_files(before) == 4 * mmap.PAGESIZE
        assert mapped[:] == content


def test_nothing_is_copied_if_the_system_lists_no_mappings(file, monkeypatch):
    monkeypatch.setattr(memory, "_MAPS", file.parent / "nowhere")
    assert (mapped_files(), copy_mapped_files(set())) == (set(), 0)
