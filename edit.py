"""Edits poses by hand, in a page of your browser: `python edit.py dance.poses.json`.

Serves `editor.html` to this computer alone, with the poses, and pictures behind them. Saving replaces only the
numbers that were edited, in the file that was opened. The page also works without this, opened from the disk.
"""

import argparse
import hashlib
import json
import secrets
import tempfile
import threading
import webbrowser
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path

from poses.behind import beside, closest_frames, draw_pictures
from poses.openpose_json import is_json, json_files, missing_numbers, read_people
from poses.source import read_driver
from safe.arguments import parse_canvas, path, whole
from safe.files import replacing
from safe.process import run_command

PAGE = Path(__file__).with_name("editor.html")
LARGEST = 32_000_000  # bytes of poses that a page is given: 10,000 frames
# The page needs nothing from anywhere else, and must not be shown within another one.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Session:
    """What is edited, and the only files that are ever written."""

    files: list[Path]
    canvas: tuple[int, int]  # (height, width), for files that do not say theirs
    pictures: list[Path]  # JPEGs
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    saving: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> dict:
        """What the page begins with: the files with their text, the canvas, and the number of pictures."""
        if (size := sum(file.stat().st_size for file in self.files)) > LARGEST:
            raise ValueError(f"{self.files[0]}: {size / 1e6:.0f} MB of poses are too many for a page")
        files = []
        for file in self.files:
            content = file.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                raise ValueError(f"{file}: not UTF-8, as JSON must be to be edited") from None
            files.append({"name": file.name, "text": text, "version": version_of(content)})
        return {"files": files, "canvas": self.canvas[::-1], "pictures": len(self.pictures)}

    def save(self, index: int, version: str, content: bytes) -> str:
        """Replaces a file, whose version must be the one that was edited. Returns the new version.

        Raises ValueError for content that is not poses of as many frames, and OSError where it cannot be written.
        """
        file = self.files[index]
        with self.saving, replacing(file) as unfinished:
            if version_of(file.read_bytes()) != version:
                raise ValueError(f"{file.name} has changed since it was opened here")
            unfinished.write_bytes(content)
            try:
                counts = [len(read_people(each, self.canvas)[0]) for each in (file, unfinished)]
            except ValueError as error:
                raise ValueError(str(error).replace(str(unfinished), file.name)) from None
            if counts[0] != counts[1]:
                told = f"has {counts[0]} frames, and what was to be saved {counts[1]}"
                raise ValueError(f"{file.name} {told}")
        return version_of(content)


def version_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Page(BaseHTTPRequestHandler):
    """Answers the page, and nobody who does not know the token."""

    timeout = 60  # seconds that a connection may be silent

    def __init__(self, session: Session, *connection):
        self.session = session
        super().__init__(*connection)

    def do_GET(self) -> None:
        match self.asked():
            case [""]:
                self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
            case ["poses"]:
                self.answer(200, "application/json", json.dumps(self.session.read()).encode())
            case ["picture", number] if self.is_below(number, self.session.pictures):
                self.answer(200, "image/jpeg", self.session.pictures[int(number)].read_bytes())
            case [*_]:
                self.answer(404)

    def do_POST(self) -> None:
        match self.asked():
            case ["save", number, version] if self.is_below(number, self.session.files):
                length = self.headers.get("Content-Length", "")
                if not self.is_below(length, range(LARGEST)):
                    return self.answer(413)
                content = self.rfile.read(int(length))
                self.answer(200, "text/plain", self.session.save(int(number), version, content).encode())
            case [*_]:
                self.answer(404)

    def asked(self) -> list[str] | None:
        """The parts of the path after the token; None for strangers, who are refused here.

        The host is compared too, because another site may give its own name this computer's address.
        """
        host = self.headers.get("Host", "").rpartition(":")[0]
        token, *parts = self.path.split("/")[1:]
        known = secrets.compare_digest(token.encode(), self.session.token.encode())
        if known and host in ("127.0.0.1", "localhost"):
            return parts
        self.answer(403)

    @staticmethod
    def is_below(number: str, those: list | range) -> bool:
        return number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < len(those)

    def answer(self, status: int, kind: str = "text/plain", content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_one_request(self) -> None:
        """What goes wrong is told to the page, which stays open."""
        try:
            super().handle_one_request()
        except ConnectionError:  # the page was closed
            self.close_connection = True
        except (OSError, ValueError) as error:
            self.answer(409, "text/plain; charset=utf-8", str(error).encode())

    def log_message(self, *_: object) -> None:
        """The terminal is for errors."""


def files_of(poses: Path) -> list[Path]:
    """The JSON files of `--poses`. Raises ValueError for other files, and for a run's own."""
    if poses.exists() and not is_json(poses):
        raise ValueError(f"{poses}: no JSON; of footage, python openpose.py {poses.name} makes poses")
    if poses.name == "frames.poses.json" and (poses.parent / "settings.json").exists():
        raise ValueError(f"{poses}: belongs to a run, which must stay as it was trained; edit a copy")
    return json_files(poses.resolve()) if poses.is_dir() else [poses.resolve()]


def main(args: argparse.Namespace) -> None:
    files, driver = files_of(args.poses), read_driver(args.poses, "json", canvas=args.canvas)
    clip = args.run / "frames" if args.run else args.clip or beside(args.poses)
    closest = closest_frames(args.run, driver) if args.run else range(driver.total)
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw_pictures(clip, Path(folder)) if clip else []
        if clip and not args.run and len(pictures) != driver.total:
            counts = f"{len(pictures)} frames, but {driver.total} poses"
            print(f"{clip}: {counts}; both are shown from the first on")
        pictures = [pictures[number] for number in closest if number < len(pictures)]
        if len(files) > 1 and any(gaps := missing_numbers(files)):  # the page shows what has a file
            numbers = (number - 1 for number in accumulate(gap + 1 for gap in gaps))
            pictures = [pictures[number] for number in numbers if number < len(pictures)]
        session = Session(files, driver.canvas, pictures)
        session.read()  # what is wrong with the files is told here
        with ThreadingHTTPServer(("127.0.0.1", args.port), partial(Page, session)) as server:
            address = f"http://127.0.0.1:{server.server_port}/{session.token}/"
            print(f"{address}\nEdit the poses in your browser, at this address. Ctrl-C ends.", flush=True)
            if args.browser:
                webbrowser.open(address)
            server.serve_forever()


def parse_arguments(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("poses", type=path, help="poses in JSON: what sample.py takes as --poses, such as dance.poses.json")
    behind = parser.add_mutually_exclusive_group().add_argument
    behind("--clip", type=path, help="video or images to show behind them (default: beside them)")
    behind("--run", type=path, help="shows the frame of this run that is closest to each pose")
    add("--canvas", type=parse_canvas, metavar="WxH", help="size of the video that the poses were found in")
    add("--port", type=whole, default=0, help="where this computer listens (default: any that is free)")
    add("--no-browser", dest="browser", action="store_false", help="print the address only")
    return parser.parse_args(command)


if __name__ == "__main__":
    run_command("edit.py", main, parse_arguments(), stopped="ended")
