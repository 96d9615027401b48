"""What is written is whole or not there, and what a killed process left behind goes."""

import os
import stat
import uuid

import pytest

import tpvprune.disk.atomic
from tpvprune.disk.atomic import is_unfinished, written_file, written_folder


def leftover(place, suffix="tmp"):
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}.{suffix}")


def write(folder, text):
    with written_folder(folder) as unfinished:
        (unfinished / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_the_same_place_go_and_nothing_else(tmp_path):
    place = tmp_path / "out"
    for _ in range(2):
        leftover(place).mkdir()
        (leftover(tmp_path / "file.json")).write_text("half")
    others = [
        *(leftover(tmp_path / "out.other"), leftover(tmp_path / "ou"), tmp_path / ".out.notes.tmp"),
        *(tmp_path / "out.tmp", tmp_path / f".out.{uuid.uuid4().hex}", tmp_path / ".out"),
    ]
    for path in others:
        path.write_text("of someone else")
    write(place, "new")
    with written_file(tmp_path / "file.json") as unfinished:
        unfinished.write_text("whole")
    assert names(tmp_path) == sorted(["out", "file.json", *(path.name for path in others)])


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_folder_set_aside_comes_back_before_it_is_replaced(
    tmp_path, monkeypatch, can_exchange
):
    # Killed between the two renames of a system that cannot exchange names.
    if not can_exchange:
        monkeypatch.setattr(tpvprune.disk.atomic, "_exchange", lambda *_: False)
    place = tmp_path / "out"
    aside = leftover(place, "old")
    aside.mkdir()
    (aside / "file").write_text("old")
    leftover(place).mkdir()
    with pytest.raises(KeyboardInterrupt), written_folder(place):
        raise KeyboardInterrupt
    assert (place / "file").read_text() == "old"
    write(place, "new")
    assert (place / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_names_of_leftovers_are_known(tmp_path):
    with written_file(tmp_path / "x.json") as unfinished:
        unfinished.write_text("")
        assert is_unfinished(unfinished)
    assert not is_unfinished(tmp_path / "x.json")
    assert not is_unfinished(tmp_path / ".x.json.tmp")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_says_who_may_read_what_is_written(umask, tmp_path):
    before = os.umask(umask)
    try:
        with written_folder(tmp_path / "folder") as folder:
            for name in ("plain", "private"):
                (folder / name).write_text(name)
            (folder / "private").chmod(0o600)  # as safetensors does
        with written_file(tmp_path / "file") as file:
            file.write_text("x")
            file.chmod(0o600)
    finally:
        os.umask(before)
    written = [*(tmp_path / "folder").iterdir(), tmp_path / "file"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}
