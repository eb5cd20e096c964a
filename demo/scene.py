"""A puppet to train on, a dance for it to follow, and the demo model fine-tuned on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from beyond.retarget import retarget
from checkpoint import Model, load_model
from demo import puppet as puppets
from demo.motion import motion
from device import compute_device
from posecrafter import PAPER, Method, embed_hints, encode_frames, encode_prompt, training_steps
from poses.pose import Pose, place_pose
from poses.source import uniform_frames
from safe.files import replacing
from train import train

PROMPT = "a person"
REPAINTED = ("hair", "shirt", "lower")  # the fields of a puppet that a prompt can give another colour
CANDIDATES = 100  # puppets among which a subject's driver is looked for


@dataclass(frozen=True)
class Trial:
    """One clip of one puppet, and everything that it depends on."""

    identity: int  # below 10,000: new to the demo model
    size: int = 128  # of the square frames, in pixels
    training_frames: int = 8
    clip_frames: int = 36  # the training frames are taken from so many, uniformly
    training_steps: int | None = None  # None: as many as in the paper; 0: the base model as it is
    learning_rate: float | None = None  # None: the demo model's own
    target_frames: int = 24
    target_every: int = 1  # of the dance's frames, every so many are asked for
    dance: str = "facing"  # the dance to follow, one of `motion.DANCES`; the training clip's is "facing"
    driver: str = "own"  # whose poses are followed: "own", or another puppet's, "literal" or "retargeted"
    # How to sample; or a function of model, scene and reference that makes the frames without sampling.
    way: Method | Callable[[Model, "Scene", int], np.ndarray] = PAPER
    ddim_steps: int = 20
    repainted: str = ""  # what should have another colour, one of REPAINTED
    guidance: float = 0  # of a prompt that says so; 0: it does not
    guidance_until: int = 0  # timestep


@dataclass(frozen=True)
class Scene:
    """The training frames and the dance to follow. Frames are uint8 (F, H, W, 3)."""

    frames: np.ndarray
    poses: Sequence[Pose]
    targets: Sequence[Pose]  # the poses to follow
    truth: np.ndarray
    true_poses: Sequence[Pose]  # the targets, unless another puppet leads
    person: np.ndarray  # the true person's pixels, booleans (F, H, W)
    prompt: str  # names the colour of what is repainted
    repainted: np.ndarray  # the truth in that colour


rendered = lru_cache(maxsize=4)(puppets.clip)  # the trials of a puppet follow one another


def set_scene(trial: Trial, number: int | None = None) -> Scene:
    """Renders a trial's scene; number: of the dance to follow (default: the puppet's own second one)."""
    identity, size, every = trial.identity, trial.size, trial.target_every
    frames, poses, _ = rendered(identity, 2 * identity, trial.clip_frames, size)
    chosen = uniform_frames(range(trial.clip_frames), trial.training_frames)
    poses = [poses[index] for index in chosen]

    number = 2 * identity + 1 if number is None else number
    followed = number, every * (trial.target_frames - 1) + 1
    truth, true_poses, person = (part[::every] for part in rendered(identity, *followed, size, trial.dance))
    targets, states = true_poses, motion(*followed)[::every]
    if trial.driver != "own":
        driver = puppets.random_puppet(unlike(identity))
        targets = [puppets.pose_of(driver, state) for state in states]
    if trial.driver == "retargeted":
        targets = retarget(targets, poses, 1.0)

    prompt, repainted = PROMPT, truth
    if trial.repainted:
        puppet, words = repaint(identity, trial.repainted)
        prompt = f"{PROMPT}, {words}"
        repainted = np.stack([puppets.render(puppet, state, size)[0] for state in states])
    return Scene(frames[chosen], poses, targets, truth, true_poses, person, prompt, repainted)


def from_the_knees_up(scene: Scene) -> Scene:
    """A scene in frames whose height is three quarters of their width, so that face and hands are larger."""
    height = scene.frames.shape[1] * 3 // 4
    cut = {name: getattr(scene, name)[:, :height] for name in ("frames", "truth", "person", "repainted")}
    poses = {name: getattr(scene, name) for name in ("poses", "targets", "true_poses")}
    placed = {name: [place_pose(pose, 1, 4 / 3, 0, 0) for pose in each] for name, each in poses.items()}
    return replace(scene, **cut, **placed)


def unlike(subject: int, among: range = range(CANDIDATES)) -> int:
    """The puppet whose build differs most from the subject's; by default among those that no model knows."""

    def build(identity: int) -> np.ndarray:
        puppet = puppets.random_puppet(identity)
        arm, leg = (puppet.upper_arm, puppet.forearm, puppet.hand), (puppet.thigh, puppet.shin)
        return np.log([*puppet.head, puppet.torso, puppet.shoulders, puppet.hips, *arm, *leg])

    return max(among, key=lambda other: np.linalg.norm(build(other) - build(subject)))


def repaint(identity: int, part: str) -> tuple[puppets.Puppet, str]:
    """A puppet with another colour of a part, one of REPAINTED, and the caption's words for it."""
    puppet = puppets.random_puppet(identity)
    colours = puppets.HAIR_COLOURS if part == "hair" else puppets.CLOTH_COLOURS
    name = "blue" if getattr(puppet, part).name == "red" else "red"
    other = replace(puppet, **{part: puppets.Paint(name, colours[name])})
    return other, puppets.caption(other).split(", ")[1 + REPAINTED.index(part)]


def load_demo() -> Model:
    """The demo model, in a precision to train with."""
    return load_model("demo", None, None, *compute_device(training=True))


def fine_tune(trial: Trial, scene: Scene, path: Path) -> None:
    """Trains a demo model on the scene and writes the trained tensors to `path`, unless they are there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    model, state = load_demo(), path.with_suffix(".pt")
    latents = encode_frames(model, scene.frames).clone()
    hints = embed_hints(model, scene.poses, *scene.frames.shape[1:3]).to(latents.device, copy=True)
    steps = trial.training_steps or training_steps(trial.training_frames)
    settings = steps, trial.learning_rate or model.learning_rate, 0, state, path.with_suffix(".csv")
    tuned = train(model, latents, hints, encode_prompt(model, PROMPT).clone(), *settings)
    with replacing(path) as unfinished:
        save_file(tuned.tensors, unfinished)
    state.unlink(missing_ok=True)
