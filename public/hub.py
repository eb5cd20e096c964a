"""The public files: which there are, where they lie on this machine, and how they are fetched."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

PATIENCE = 4  # seconds


@dataclass(frozen=True)
class PublicFile:
    """A file on the Hugging Face hub. Of the files of one part, any one will do."""

    part: str
    repo: str
    path: str
    megabytes: int

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}"

    def cached(self) -> Path | None:
        """Where the file lies on this machine, if it has been downloaded."""
        found = try_to_load_from_cache(self.repo, self.path)
        return Path(found) if isinstance(found, str) else None


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
OPENPOSE_CONTROL = "lllyasviel/control_v11p_sd15_openpose"
PUBLIC_FILES = [
    PublicFile("unet", SD15, "unet/diffusion_pytorch_model.fp16.safetensors", 1719),
    PublicFile("unet", SD15, "unet/diffusion_pytorch_model.safetensors", 3438),
    PublicFile("controlnet", OPENPOSE_CONTROL, "diffusion_pytorch_model.fp16.safetensors", 723),
    PublicFile("controlnet", OPENPOSE_CONTROL, "diffusion_pytorch_model.safetensors", 1445),
    PublicFile("controlnet", "lllyasviel/ControlNet-v1-1", "control_v11p_sd15_openpose.pth", 1445),
    PublicFile("vae", "stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors", 335),
    PublicFile("text_encoder", SD15, "text_encoder/model.fp16.safetensors", 246),
    PublicFile("text_encoder", SD15, "text_encoder/model.safetensors", 492),
    PublicFile("vocab", SD15, "tokenizer/vocab.json", 1),
    PublicFile("merges", SD15, "tokenizer/merges.txt", 1),
    PublicFile("body", "lllyasviel/Annotators", "body_pose_model.pth", 209),
    PublicFile("hand", "lllyasviel/Annotators", "hand_pose_model.pth", 147),
    PublicFile("face", "lllyasviel/Annotators", "facenet.pth", 154),
]


def choices(part: str, half: bool) -> list[PublicFile]:
    """The public files of a part, the best first: those that are here, then those of the wanted precision."""
    files = [file for file in PUBLIC_FILES if file.part == part]
    return sorted(files, key=lambda file: (not file.cached(), (".fp16." in file.path) != half))


def public_files(parts: Iterable[str], half: bool) -> dict[str, Path]:
    """The public file of each part, preferably in `half` precision, downloaded if it is not here yet.

    Raises OSError, in one line that names all the files still missing, when there is no connection.
    """
    wanted = {part: choices(part, half) for part in parts}
    with suppress(LocalEntryNotFoundError):
        if all(files[0].cached() for files in wanted.values()) or hub_answers():
            return {part: files[0].cached() or download(files) for part, files in wanted.items()}
    missing = [files[0] for files in wanted.values() if not files[0].cached()]
    told = f"no connection to {constants.ENDPOINT}, and not downloaded yet: {', '.join(map(str, missing))}"
    there = f"{size_of(missing)}, to be cached in {constants.HF_HUB_CACHE}"
    advice = "where there is a connection, and copy that folder here; `--model demo` works without"
    raise OSError(f"{told} ({there}); fetch them with `python checkpoint.py --download` {advice}")


def hub_answers() -> bool:
    """Whether the hub answers at all, in `PATIENCE` seconds: a download would try for up to 100."""
    answers = []

    def ask() -> None:
        with suppress(OSError, RuntimeError, HTTPError):
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE))

    asking = Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    asking.start()
    asking.join(PATIENCE)
    return bool(answers)


def download(files: list[PublicFile]) -> Path:
    """Fetches the first of the files that the hub has. Raises OSError, LocalEntryNotFoundError if offline."""
    for file in files:
        try:
            return Path(hf_hub_download(file.repo, file.path))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue  # a mirror may lack the half-precision files
        except (OSError, RuntimeError, HTTPError) as error:  # the second is hf_xet's
            reason = " ".join(str(error).split())
            raise OSError(f"{file}: download failed, run the same command again ({reason})") from None
    advice = "if you have it elsewhere, give its path"
    raise FileNotFoundError(f"{files[0]}: not at {constants.ENDPOINT}; {advice}")


def size_of(files: Iterable[PublicFile]) -> str:
    megabytes = sum(file.megabytes for file in files)
    return f"{megabytes / 1000:.2f} GB" if megabytes > 99 else f"{megabytes} MB"


def list_public_files() -> list[PublicFile]:
    """Prints which public files are here and which are missing; returns the missing ones."""
    wanted = [choices(part, half=True)[0] for part in dict.fromkeys(f.part for f in PUBLIC_FILES)]
    print(f"Public files, cached in {constants.HF_HUB_CACHE}:")
    for file in wanted:
        state = "here" if file.cached() else "missing"
        print(f"  {state:7}  {size_of([file]):>7}  {file.part:12}  {file}")
    return [file for file in wanted if not file.cached()]
