"""Files are written whole or not at all, by one process at a time, and read without trust."""

import errno
import gc
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

# ---- Writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, with the same extension, that takes its place if all goes well.

    Raises OSError, which names `path`, where it cannot be written, as on a full disk.
    """
    remove_leftovers(path.parent)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with naming(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # a disk that has become read-only
            unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system while writing become one line that names `path`."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename and path.parent.absolute() not in Path(error.filename).absolute().parents
        if error.errno is None or elsewhere:  # one line already, or about a file that is read
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else os.strerror(error.errno).lower()
    except RuntimeError as error:  # of `torch.save`
        if not re.search("PytorchStreamWriter|inline_container|Parent directory", str(error)):
            raise
        known = re.search(r"strerror: (.+)|Parent directory .* (does not exist)", str(error))
        reason = (known[1] or "its folder " + known[2]).lower() if known else "the disk is full"
    else:
        return
    raise OSError(f"{path}: could not be written: {reason}")


LEFTOVER = re.compile(r"\.(.+)\.(\d+)(\.\w+)?")  # what `replacing` and `replacing_set` call theirs


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left unfinished in a folder."""
    if os.name == "nt" or not folder.is_dir():  # asking whether a process lives would end it on Windows
        return
    for name in os.listdir(folder):
        match = name[0] == "." and LEFTOVER.fullmatch(name)
        if match and not is_alive(int(match[2])):
            path = folder / name
            with suppress(OSError):  # of somebody else, or on a read-only disk
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of somebody else
        return True
    return True


@contextmanager
def replacing_set(
    out: Path, endings: tuple[str, ...], in_the_way: Callable[[], list[str]] = list
) -> Iterator[Path]:
    """A folder for files called as `out` with these endings, which replace those beside `out` together.

    They are moved once all are written, the last one last: where that is missing, a set is not whole. A process
    that is killed while it moves them leaves the folder with the rest, and `finish_set` moves that.

    in_the_way: says, just before they are moved, what must not be replaced. If anything, the set stays together in
        a folder beside it, and OSError says where.
    """
    remove_leftovers(out.parent)
    unfinished = out.parent / f".{out.stem}.{os.getpid()}"
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    try:
        with naming(out):
            unfinished.mkdir(parents=True)
            yield unfinished
            if wrong := in_the_way():
                os.rename(unfinished, kept := free_folder(out))
                raise OSError(f"{out}: would overwrite {wrong[0]}; the result lies in {kept} instead")
            for ending in endings:  # what the new set lacks would be left beside it
                if not (unfinished / out.with_suffix(ending).name).exists():
                    out.with_suffix(ending).unlink(missing_ok=True)
            os.replace(unfinished, whole_folder(out))
        finish_set(out, endings)
    except OSError as error:  # which may name the unfinished file
        raise OSError(str(error).replace(str(unfinished), str(out.parent))) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # not empty: all went well
            for folder in made:
                folder.rmdir()


def free_folder(out: Path) -> Path:
    """A name beside `out` that nothing has yet."""
    names = (out.with_name(f"{out.stem}_{number}") for number in itertools.count(2))
    return next(path for path in names if not path.exists())


def whole_folder(out: Path) -> Path:
    """Where a set waits that is written, but not yet moved to its place."""
    return out.parent / f".{out.stem}.whole"


def finish_set(out: Path, endings: tuple[str, ...]) -> None:
    """Moves a set that is written to its place."""
    folder = whole_folder(out)
    if not folder.is_dir():
        return
    last = out.with_suffix(endings[-1])
    if (folder / last.name).exists():  # else all have been moved
        last.unlink(missing_ok=True)  # it would belong to other files
        for ending in endings:
            with suppress(FileNotFoundError):  # moved before the process was killed
                os.replace(folder / out.with_suffix(ending).name, out.with_suffix(ending))
    shutil.rmtree(folder)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError where the disk of a folder, which need not exist, has fewer bytes left than needed."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        unit, name = (1e9, "GB") if needed >= 1e8 else (1e6, "MB")
        wanted = f"needs {needed / unit:.1f} {name}, but only {free / unit:.1f} {name} are free"
        raise OSError(f"{folder}: {wanted}; make room, or choose another folder")


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Keeps other processes out of a run folder. The lock ends with its process, however that ends.

    The folder is made, and removed again where nothing was put into it. Raises OSError where another works.
    """
    if files := [each for each in (folder, *folder.parents) if each.exists() and not each.is_dir()]:
        raise NotADirectoryError(f"{folder}: {files[0]} is a file, not a folder; choose another --run")
    # Windows cannot lock a folder.
    lock = folder if os.name != "nt" else folder / ".lock"
    told = "another process works there; wait for it, or choose another --run"
    return locked(lock, folder, folder, told)


def alone_with(out: Path) -> AbstractContextManager[None]:
    """Keeps other processes from what `replacing_set` writes beside `out`, as `alone_in` does from a folder."""
    told = "another process is making it; wait for it, or choose another --out"
    return locked(out.with_name(f".{out.stem}.lock"), out.parent, out, told)


@contextmanager
def locked(lock: Path, folder: Path, named: Path, told: str) -> Iterator[None]:
    """Holds a lock, a folder or a file in it. Raises OSError: that it is taken, or could not be made (`named`)."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with naming(named):
        folder.mkdir(parents=True, exist_ok=True)
        handle = take(lock, os.O_RDONLY if lock == folder else os.O_RDWR | os.O_CREAT)
    if handle is None:
        raise OSError(f"{named}: {told}")
    try:
        yield
    finally:
        if os.name == "nt":  # where only what is closed can be removed
            os.close(handle)
        with suppress(OSError):
            if lock != folder:
                lock.unlink()
            for each in made:
                each.rmdir()  # fails where it is not empty
        if os.name != "nt":  # last: whoever has opened the file meanwhile finds it removed
            os.close(handle)


def take(lock: Path, flags: int) -> int | None:
    """Opens and locks a file or folder; None where another process has locked it."""
    while True:
        handle = os.open(lock, flags)
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Other errors are of network folders without locks, where work must be possible all the same.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                os.close(handle)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        os.close(handle)  # its last holder removed it between the two calls: once more


# ---- Reading ------------------------------------------------------------------------------------

LARGEST_JSON = 250_000_000  # bytes
MOST_MEMORY = 1_600_000_000  # bytes to read a JSON file with: 45 minutes of poses with face and hands
# What each of these characters may cost in bytes of objects, measured with CPython 3.11.
COSTS = {b"[": 104, b"{": 72, b":": 70, b",": 44, b'"': 30}


def read_json(path: Path, largest: int = LARGEST_JSON) -> object:
    """What a JSON file holds.

    Raises OSError, and ValueError for what is no JSON, above `largest` bytes, or would take too much memory.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError(f"{path}: is no file")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size / 1e6:.0f} MB is too large for a JSON file that is read here")
    content, collecting = path.read_bytes(), gc.isenabled()
    if (needed := memory_to_read(content)) > MOST_MEMORY:
        told = f"may take {needed / 1e9:.1f} GB of memory to read, which is too much"
        raise ValueError(f"{path}: {told}; split it")
    gc.disable()  # what is made here has no circles, and looking for them takes most of the time
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path}: not readable as JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({mistaken(content) or error})") from None
    finally:
        if collecting:
            gc.enable()


def memory_to_read(content: bytes) -> int:
    """Bytes that a JSON text and what is made of it take at most."""
    # As bytes, as text, and as strings in that; characters take one byte each, or up to four.
    text = len(content) * (3 if content.isascii() else 9)
    return text + sum(content.count(each) * cost for each, cost in COSTS.items())


# What other files begin with that get the name of the one that was wanted.
MISTAKEN = {
    (b"version https://git-lfs",): "a Git LFS pointer: get the file itself with `git lfs pull`",
    (b"<!doctype html", b"<html"): "a web page: download the file itself",
    (b"\x1f\x8b", b"PK\3\4"): "an archive: unpack it first",
}


def mistaken(head: bytes) -> str | None:
    """What a file is that begins so, if it is none of what is read here; None for anything else."""
    start = head[:64].lstrip().lower()
    told = (what for starts, what in MISTAKEN.items() if start.startswith(tuple(map(bytes.lower, starts))))
    return next(told, None if head else "the file is empty")


def read_text(path: Path, largest: int) -> str:
    """What a text file holds. Raises OSError, and ValueError for what is no text, or above `largest` bytes."""
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size / 1e6:.0f} MB is too large for a file of this kind")
    return path.read_text("utf-8")
