"""Makes a video of the person of a run, following any poses: `python sample.py --poses dance.mp4`.

Writes, side by side: the video, a contact sheet (target pose, result), the poses as they were followed, and the
settings with what happened.
"""

from command import keep_freed_memory, run_command, sampling_arguments

if __name__ == "__main__":  # before the imports below, which take seconds
    args = sampling_arguments()
    keep_freed_memory()

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from beyond.plan import print_plan, sampling_peak
from beyond.pseudo import HELD_UNTIL, METHODS, STILL, background_change, hold_to_pseudo_video
from beyond.retarget import proportions, retarget
from checkpoint import Model, load_model, read_settings
from device import compute_device, describe
from posecrafter import Generated, Method, ddim_timesteps, decode_latents, generate, select_reference
from poses.pose import Pose, absences, draw_pose, place_pose, save_poses
from poses.source import Driver, read_driver
from public.places import locate_parts
from run import Run, load_run, load_trained, name_of, newest_run, write_json
from video import VIDEOS_WRITTEN, add_sound, contact_sheet, cover, has_sound, save_image, write_video


@dataclass(frozen=True)
class Task:
    """What the options and the inputs come to, decided once."""

    run: Run
    prompt: str
    method: Method
    method_from: str  # whose choice it is: "--method" or "the model's default"
    driver: Driver
    targets: list[Pose]  # on the run's canvas, as they will be followed
    proportions: dict[str, float] | None  # the subject's to the driver's; None: not retargeted
    reference: int  # its position among the training frames


# ---- What is asked for --------------------------------------------------------------------------


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense, by themselves or together."""
    ddim_timesteps(args.ddim_steps)
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f"--fps {args.fps:g}: give a number above 0")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance:g}: give a number such as 1 or 3")
    if args.slice is not None and args.slice < 1:
        raise ValueError(f"--slice {args.slice}: give a number above 0")
    if args.fixed_point is not None and not 0 <= args.fixed_point <= 20:
        raise ValueError(f"--fixed-point {args.fixed_point}: give a number from 0 to 20")
    if args.replay and args.no_insert:
        raise ValueError("--replay: replays the key frame, which --no-insert leaves out")


def check_out(out: Path, inputs: list[Path]) -> None:
    """Raises ValueError where a result cannot lie, or would replace an input or a JSON file that is no report."""
    if out.suffix.lower() not in VIDEOS_WRITTEN:
        raise ValueError(f"{out}: a video's name must end in {' or '.join(VIDEOS_WRITTEN)}")
    written = [out.with_suffix(end).resolve() for end in (out.suffix, ".png", ".json", ".poses.json")]
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(f"{out}: with what comes beside it would overwrite {path}; choose an --out")
        if path.is_dir() and path.resolve() == written[0].parent:
            raise ValueError(f"{out}: would lie among the frames in {path}; choose another --out")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; choose another --out")
    report = out.with_suffix(".json")
    if report.exists() and b'"ddim_steps"' not in report.read_bytes():
        raise ValueError(f"{out}: its report would overwrite {report}, which is none; choose another --out")
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{out}: {above} is a file, not a folder")


def moved_once(method: Method) -> Method:
    """The method, held to no pseudo video: parts are moved once, and the rest is left to the model."""
    held = method.editor is hold_to_pseudo_video
    return replace(method, name="body", editor=METHODS["body"].editor) if held else method


def choose_method(args: argparse.Namespace, settings: dict, prompt: str) -> tuple[Method, str]:
    """The method that the options make, and whose choice its name is.

    A prompt of one's own wants something else than the training frames show. So nothing is held to them then, and
    the key frame, which all frames take their looks from, is not replayed unless that is asked for.
    Raises ValueError for an edit step that does not go with the other options.
    """
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    name = args.method or read_settings(sources).get("method", Model.method)
    own_looks, from_noise = prompt != settings["prompt"], args.start == "noise"
    changes = {"start": args.start, "insert": not args.no_insert}
    if own_looks:
        changes |= {"edit_step": 1, "replay": False}
    if from_noise:
        changes["replay"] = False
    if args.no_edit or (from_noise and args.edit_step is None):
        changes["parts"] = None
    asked = {name: getattr(args, name) for name in ("edit_step", "fixed_point", "replay")}
    changes |= {name: value for name, value in asked.items() if value is not None}
    if args.no_insert:
        changes["replay"] = False
    method = replace(METHODS[name], **changes)

    step = method.edits_before(args.ddim_steps)
    if not 1 <= step <= args.ddim_steps:
        raise ValueError(f"--edit-step {args.edit_step}: there are steps 1 to {args.ddim_steps}")
    if from_noise and method.parts and step == 1:
        raise ValueError(
            "--start noise --edit-step 1: at the first step that noise has nothing of the reference to be moved; "
            "give an --edit-step above 1"
        )
    too_late = ddim_timesteps(args.ddim_steps)[step - 1] < HELD_UNTIL
    method = moved_once(method) if own_looks or from_noise or too_late else method
    return method, "--method" if args.method else "the model's default"


def inputs_of(settings: dict) -> list[Path]:
    """The clip that a run was trained on, and the file of its poses if it had one."""
    return [Path(settings[name]) for name in ("clip", "poses") if settings.get(name)]


def is_training_clip(poses: Path, settings: dict) -> bool:
    """Whether the poses to follow are those of the clip that the run was trained on, or the clip itself."""
    return poses.resolve() in [path.resolve() for path in inputs_of(settings)]


def read_targets(args: argparse.Namespace, run: Run) -> tuple[Driver, list[Pose], dict[str, float] | None]:
    """The driver, its poses on the run's canvas as they will be followed, and how they were retargeted, if so.

    The driver covers the canvas as the training frames did. Raises ValueError for frames without a person.
    """
    looking = run.settings["model"], run.folder / "poses", args.person, args.smooth
    driver = read_driver(args.poses, args.poses_are, args.range, *looking, canvas=args.canvas)
    if args.canvas and driver.fps:
        raise ValueError(f"{args.poses}: --canvas is for JSON; footage has a size of its own")
    if missing := absences(driver.poses, driver.within.start):
        advice = "leave them out with --range, or fill them in"
        raise ValueError(f"{args.poses}: no person in frames {missing}; {advice}")
    height, width = run.frames.shape[1:3]
    placing = cover(*(driver.canvas or (height, width)), height, width)
    targets = [place_pose(pose, *placing.placement) for pose in driver.poses]
    if not args.retarget and (args.retarget is False or is_training_clip(args.poses, run.settings)):
        return driver, targets, None
    try:
        ratios = proportions(targets, run.poses, width / height)
    except ValueError as error:
        raise ValueError(f"{args.poses}: {error}; --no-retarget follows it literally") from None
    return driver, retarget(targets, run.poses, width / height), ratios


def choose_reference(text: str, run: Run, targets: list[Pose]) -> int:
    """ "auto" or a training frame's number -> its position among the training frames."""
    if text == "auto":
        return select_reference(run.poses, targets)
    indices = run.settings["frames"]
    if not text.isdecimal() or int(text) not in indices:
        numbers = ", ".join(map(str, indices))
        raise ValueError(f"--reference {text}: give auto or one of the training frames, {numbers}")
    return indices.index(int(text))


# ---- What is done -------------------------------------------------------------------------------


def load_tuned(run: Run) -> Model:
    """The model with the run's weights, on the device that is there."""
    model = load_model(*(run.settings[part] for part in ("model", "controlnet", "vae")), *compute_device())
    load_trained(model, run.folder / "trained.safetensors")
    for used_now_and_then in (model.vae, model.text_encoder):
        used_now_and_then.to("cpu")  # and on the device only while it is used
    return model


def held_if_still(method: Method, run: Run, model: Model) -> Method:
    """The method, held to no pseudo video where the training frames show no still background to make one of."""
    held = method.parts and method.editor is hold_to_pseudo_video
    if not held or background_change(run.frames, run.poses, model.vae.config.factor) <= STILL:
        return method
    print(
        "the training frames show no still background: parts are moved once, the rest is left to the model"
    )
    return moved_once(method)


def generate_or_explain(args: argparse.Namespace, task: Task, model: Model) -> Generated:
    """`generate` as the command line says. Raises MemoryError with how much memory would do."""
    run, method = task.run, task.method
    options = run.settings["prompt"], task.prompt, args.guidance, args.seed, args.slice, args.offload
    try:
        return generate(model, run, task.targets, method, task.reference, args.ddim_steps, *options)
    except MemoryError as error:
        frames = len(task.targets) + method.insert
        size = (side // model.vae.config.factor for side in run.frames.shape[1:3])
        dtype = model.unet.conv_in.weight.dtype
        offload = "never" if args.offload == "never" else "always"
        peak = sampling_peak(model, frames, *size, dtype, args.guidance, args.slice or 1, offload)
        raise MemoryError(f"{error}; {frames} frames need about {peak / 1e9:.1f} GB") from None


def faithfulness(model: Model, made: Generated, reference: np.ndarray) -> float | None:
    """PSNR in dB of the reference as sampling gives it back; None where it was not inserted."""
    if made.reconstruction is None:
        return None
    (frame,) = decode_latents(model, made.reconstruction)
    error = (frame.astype(np.float64) - reference) ** 2 / 255**2
    return -10 * math.log10(max(error.mean(), 1e-10))


def write_result(args: argparse.Namespace, out: Path, task: Task, frames: np.ndarray) -> dict:
    """Writes video, contact sheet and poses; returns what a report says of them."""
    (height, width), driver = frames.shape[1:3], task.driver
    out.parent.mkdir(parents=True, exist_ok=True)
    fps = args.fps or driver.fps or task.run.settings["fps"]
    write_video(out, frames, fps)
    # At another speed the sound would run away from the movements.
    sound = fps == driver.fps and not args.no_audio and has_sound(args.poses)
    if sound:
        try:
            add_sound(out, args.poses, driver.within.start / fps, len(frames) / fps)
        except OSError as error:  # which is no reason to leave the rest unwritten
            sound = False
            print(f"{out}: without sound: {error}")
    save_poses(out.with_suffix(".poses.json"), task.targets, width, height)
    drawn = [draw_pose(pose, height, width) for pose in task.targets]
    save_image(out.with_suffix(".png"), contact_sheet({"pose": drawn, "result": frames}))
    return {"frames": len(frames), "fps": fps, "sound": sound}


def report_of(args: argparse.Namespace, task: Task, model: Model, made: Generated) -> dict:
    """The settings and what happened, but for what is known only once the video is written."""
    run, method = task.run, task.method
    options = {name: getattr(args, name) for name in ("guidance", "ddim_steps", "seed")}
    ways = {name: getattr(method, name) for name in ("start", "replay", "fixed_point")}
    made_how = {
        "run": str(run.folder),
        "poses": str(args.poses),
        "retargeted": task.proportions is not None,
        "proportions": task.proportions,
        "prompt": task.prompt,
        "guidance_until": model.guidance_until,
        "method": method.name,
        "method_from": task.method_from,
        "learning_rate": run.settings["learning_rate"],
        "learning_rate_from": run.settings.get("learning_rate_from", "unknown"),
        "edit": method.parts and method.parts.__name__,
        "edit_step": method.edits_before(args.ddim_steps) if method.parts else None,
        "inserted": method.insert,
        "reference": run.settings["frames"][task.reference],
        # Sampled as key frame; alone, and so without replay, where the key frame is replayed.
        "reference_psnr": faithfulness(model, made, run.frames[task.reference]),
        "edited_regions": made.regions,
    }
    return made_how | options | ways


def main(args: argparse.Namespace) -> np.ndarray | None:
    """Does what the command line says; returns the frames (F, H, W, 3) uint8, as before compression."""
    check_numbers(args)
    run = load_run(args.run or newest_run())
    prompt = run.settings["prompt"] if args.prompt is None else args.prompt
    method, method_from = choose_method(args, run.settings, prompt)
    out = args.out or run.folder / "samples" / f"{name_of(args.poses)}.mp4"
    check_out(out, [args.poses, *inputs_of(run.settings)])
    driver, targets, ratios = read_targets(args, run)
    k = choose_reference(args.reference, run, targets)
    if args.plan:
        print_plan(run, method, len(targets), args.ddim_steps, args.guidance, args.slice, args.offload)
        return None

    model = load_tuned(run)
    method = held_if_still(method, run, model)
    task = Task(run, prompt, method, method_from, driver, targets, ratios, k)
    rate, rate_from = run.settings["learning_rate"], run.settings.get("learning_rate_from", "unknown")
    print(f"trained at a learning rate of {rate:g} ({rate_from})")
    print(f"method {method.name} ({method_from}), {args.ddim_steps} steps, on {describe(model)}")
    made = generate_or_explain(args, task, model)
    report = report_of(args, task, model, made)
    frames = np.stack([*tqdm(decode_latents(model, made.latents), desc="decoding", total=len(targets))])
    report = write_result(args, out, task, frames) | report
    write_json(out.with_suffix(".json"), report)
    print(f"{out}: {len(frames)} frames, from training frame {report['reference']}; look at {out.stem}.png")
    return frames


if __name__ == "__main__":
    run_command("sample.py", main, args, out_of_memory="frames of this size need a larger card")
