"""Files are whole or not there, whoever is killed; folders belong to one process at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from safe.files import (
    alone_in,
    alone_with,
    finish_set,
    memory_to_read,
    mistaken,
    read_json,
    remove_leftovers,
    replacing,
    replacing_set,
    require_space,
)

ENDINGS = ".mp4", ".png", ".json"


def write_set(out: Path, text: str) -> None:
    with replacing_set(out, ENDINGS) as folder:
        for ending in ENDINGS:
            (folder / out.name).with_suffix(ending).write_text(text)


def read_set(out: Path) -> list[str]:
    files = [out.with_suffix(ending) for ending in ENDINGS]
    return [file.read_text() if file.exists() else "" for file in files]


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system"),
        (
            RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed"),
            "the disk is full",
        ),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, error, reason):
    with pytest.raises(OSError, match=rf"a\.txt: could not be written: {reason}$"):
        with replacing(tmp_path / "a.txt"):
            raise error


def test_a_set_is_replaced_together_or_not_at_all(tmp_path):
    out = tmp_path / "out.mp4"
    write_set(out, "old")
    with pytest.raises(KeyError), replacing_set(out, ENDINGS) as folder:
        (folder / "out.mp4").write_text("half")
        raise KeyError
    assert read_set(out) == ["old"] * 3
    with pytest.raises(KeyError), replacing_set(tmp_path / "new" / "folder" / "out.mp4", ENDINGS):
        raise KeyError
    assert not (tmp_path / "new").exists(), "a folder was made for nothing"
    with pytest.raises(OSError) as refused, replacing_set(out, ENDINGS) as folder:
        raise OSError(f"{folder / 'out.png'}: could not be written")
    assert str(refused.value) == f"{tmp_path / 'out.png'}: could not be written"
    write_set(out, "new")
    assert read_set(out) == ["new"] * 3 and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("moved", range(4))
def test_a_set_whose_moving_was_interrupted_is_finished_by_the_next(tmp_path, moved, monkeypatch):
    out, replace, calls = tmp_path / "out.mp4", os.replace, []

    def killed(source, target):
        if len(calls) == moved:
            raise SystemExit  # nothing but the folder's own removal follows
        calls.append(target)
        replace(source, target)

    write_set(out, "old")
    monkeypatch.setattr("safe.files.os.replace", killed)
    with pytest.raises(SystemExit):
        write_set(out, "new")
    monkeypatch.undo()
    if moved:
        assert not out.with_suffix(".json").exists() or moved == 4  # an unfinished set has no report
    finish_set(out, ENDINGS)
    assert read_set(out) == ["new" if moved else "old"] * 3
    assert len(list(tmp_path.iterdir())) == 3


def test_a_set_that_was_moved_whole_stays_as_it_is(tmp_path, monkeypatch):
    """The process was killed between moving the report and removing the empty folder."""
    out = tmp_path / "out.mp4"
    monkeypatch.setattr("safe.files.shutil.rmtree", lambda *_, **__: None)
    write_set(out, "new")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 4
    finish_set(out, ENDINGS)
    assert read_set(out) == ["new"] * 3 and len(list(tmp_path.iterdir())) == 3


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".clip.{dead.pid}.mp4").touch()
    (tmp_path / f".out.{dead.pid}").mkdir()
    kept = [f".clip.{os.getpid()}.mp4", ".hidden", ".a.b.mp4", "clip.1.mp4"]
    for name in kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def holder(lock: str, path: Path) -> subprocess.Popen:
    """Another process that holds a lock of `safe.files` until it is killed."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from safe.files import alone_in, alone_with
with {lock}(Path({str(path)!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    return other


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        (alone_in, "another process works there; .* --run"),
        (alone_with, "another process is making it; .* --out"),
    ],
)
def test_what_one_process_makes_is_free_when_that_is_killed(tmp_path, lock, words):
    path = tmp_path if lock is alone_in else tmp_path / "out.mp4"
    other = holder(lock.__name__, path)
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(OSError, match=words), lock(path):
            pass
    if lock is alone_with:  # other videos of the folder, and other sets, are free
        with alone_with(tmp_path / "out2.mp4"):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    time.sleep(0.1)
    with lock(path):
        pass
    assert not list(tmp_path.iterdir()), "a lock was left"


def test_a_lock_that_was_removed_while_it_was_opened_is_none(tmp_path, monkeypatch):
    """Its holder removes it and lets it go between our opening and our locking."""
    out, opened = tmp_path / "out.mp4", os.open
    lock = tmp_path / ".out.lock"

    def too_early(*given):
        monkeypatch.undo()
        handle = opened(*given)
        lock.unlink()
        return handle

    monkeypatch.setattr("safe.files.os.open", too_early)
    with alone_with(out):
        assert lock.exists()
        with pytest.raises(OSError, match="another process is making it"), alone_with(out):
            pass
    assert not lock.exists()


def test_what_came_meanwhile_is_not_replaced_and_the_set_is_kept(tmp_path):
    out = tmp_path / "out.mp4"
    (tmp_path / "out_2").mkdir()
    with pytest.raises(OSError) as refused:
        with replacing_set(out, ENDINGS, lambda: [path.name for path in tmp_path.glob("out.*")]) as folder:
            for ending in ENDINGS:
                (folder / out.name).with_suffix(ending).write_text("new")
            (tmp_path / "out.png").write_text("mine")
    assert (
        str(refused.value) == f"{out}: would overwrite out.png; the result lies in {tmp_path}/out_3 instead"
    )
    assert read_set(out) == ["", "mine", ""] and read_set(tmp_path / "out_3" / "out.mp4") == ["new"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out_2", "out_3"]


def test_space_is_asked_for_also_where_the_folder_is_yet_to_be_made(tmp_path):
    require_space(tmp_path / "runs" / "new", 1000)
    with pytest.raises(OSError, match=r"new: needs 1000000\.0 GB, but only"):
        require_space(tmp_path / "runs" / "new", 10**15)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' + b"[" * 100_000, b"{", b"\xff", b"", b"1e"])
def test_json_that_cannot_be_read_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: not readable as JSON \([^\n]*\)$"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n<HTML lang='en'>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\x1f\x8b\x08", "an archive"),
    ],
)
def test_what_is_no_json_but_something_known_is_called_by_its_name(tmp_path, head, words):
    (tmp_path / "a.json").write_bytes(head)
    with pytest.raises(ValueError, match=rf"a\.json: not readable as JSON \({words}[^\n]*\)$"):
        read_json(tmp_path / "a.json")
    assert mistaken(b'[{"people": []}]') is None


UNITS = [
    "[]",
    "{}",
    '{"a":0}',
    '"ab"',
    '"é"',
    '"漢"',
    '"🕺"',
    "1e1",
    "999",
    "[0]",
    "123.4567",
    "0",
    "[{}]",
    "[[[0]]]",
]
UNITS += ['{"a":{}}', '{"a":0,"b":1}', '{"a":[0],"b":[]}', '"' + 90 * "a" + '"', "0.0", "true"]


@pytest.mark.parametrize("unit", UNITS)
def test_no_json_takes_more_memory_than_is_reckoned(tmp_path, unit):
    content = ("[" + ",".join([unit] * 20_000) + "]").encode()
    (tmp_path / "a.json").write_bytes(content)
    tracemalloc.start()
    read = read_json(tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == 20_000 and read[0] == json.loads(unit)
    assert peak < memory_to_read(content) + 10_000


def test_json_that_would_fill_the_memory_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + b"[]," * 15_000_000 + b"0]")
    started = time.process_time()
    with pytest.raises(ValueError, match=r"a\.json: may take 2\.4 GB of memory to read, which is too much"):
        read_json(tmp_path / "a.json")
    assert time.process_time() - started < 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError, match=r"a\.json: is no file$"):
        read_json(tmp_path / "a.json")
