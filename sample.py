"""Makes a video of the person of a run, following any poses: `python sample.py --poses dance.mp4`.

Writes, side by side: the video, a contact sheet (target pose, result), the poses as they were followed, and the
settings with what happened.
"""

from command import keep_freed_memory, run_command, sampling_arguments

if __name__ == "__main__":  # before the imports below, which take seconds
    args = sampling_arguments()
    keep_freed_memory()

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from beyond.pseudo import HELD_UNTIL, METHODS, STILL, background_change, hold_to_pseudo_video
from beyond.retarget import proportions, retarget
from checkpoint import Model, load_model, locate_parts, networks_without_weights, read_settings
from device import compute_device, describe
from memory import CUDA, operations, sampling_peak, seconds_per_frame
from posecrafter import (
    TRAIN_STEPS,
    Generated,
    Method,
    ddim_timesteps,
    decode_latents,
    edit_once,
    generate,
    select_reference,
)
from poses.pose import Pose, absences, draw_pose, place_pose, save_poses
from poses.source import Driver, read_driver
from run import Run, load_run, load_trained, name_of, newest_run, write_json
from video import VIDEOS_WRITTEN, add_sound, contact_sheet, cover, has_sound, open_video, save_image

# ---- What is asked for --------------------------------------------------------------------------


def place_targets(driver: Driver, path: Path, run: Run) -> list[Pose]:
    """The driver's poses on the run's canvas, which they cover as the training frames did.

    Raises ValueError for frames without a person.
    """
    if missing := absences(driver.poses, driver.within.start):
        raise ValueError(
            f"{path}: no person in frames {missing}; leave them out with --range, or fill them in"
        )
    height, width = run.frames.shape[1:3]
    placing = cover(*(driver.canvas or (height, width)), height, width)
    return [place_pose(pose, *placing.placement) for pose in driver.poses]


def is_training_clip(poses: Path, settings: dict) -> bool:
    """Whether the poses to follow are those of the clip that the run was trained on, or the clip itself."""
    own = [Path(settings[name]).resolve() for name in ("clip", "poses") if settings.get(name)]
    return poses.resolve() in own


def choose_reference(text: str, run: Run, targets: list[Pose]) -> int:
    """ "auto" or a training frame's number -> its position among the training frames."""
    if text == "auto":
        return select_reference(run.poses, targets)
    indices = run.settings["frames"]
    if not text.isdecimal() or int(text) not in indices:
        raise ValueError(
            f"--reference {text}: give auto or one of the training frames, {', '.join(map(str, indices))}"
        )
    return indices.index(int(text))


def check_out(out: Path, inputs: list[Path]) -> None:
    """Raises ValueError where a result cannot or should not lie: over the files that it is made from, among them,
    or with its report over a JSON file that is none.
    """
    if out.suffix.lower() not in VIDEOS_WRITTEN:
        raise ValueError(f"{out}: a video's name must end in {' or '.join(VIDEOS_WRITTEN)}")
    written = [out.with_suffix(end).resolve() for end in (out.suffix, ".png", ".json", ".poses.json")]
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(
                f"{out}: it and what is written beside it would overwrite {path}; choose an --out"
            )
        if path.is_dir() and path.resolve() == written[0].parent:
            raise ValueError(f"{out}: would lie among the frames in {path}; choose another --out")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; choose another --out")
    report = out.with_suffix(".json")
    if report.exists():
        try:
            is_report = "ddim_steps" in json.loads(report.read_bytes())
        except (ValueError, TypeError):
            is_report = False
        if not is_report:
            raise ValueError(
                f"{out}: its report would overwrite {report}, which is no report; choose another --out"
            )
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{out}: {above} is a file, not a folder")


def moved_once(method: Method) -> Method:
    """The method without a pseudo video that it is held to: parts are moved, and the rest left to the model."""
    if method.editor is hold_to_pseudo_video:
        return replace(method, name="body", editor=edit_once)
    return method


def choose_method(args: argparse.Namespace, settings: dict, prompt: str) -> tuple[Method, str]:
    """The method that the options make, and whose choice its name is.

    A prompt of one's own wants something else than the training frames show. So nothing is held to them then, and
    the key frame, which all frames take their looks from, is not replayed unless that is asked for.
    Raises ValueError for options that do not go together.
    """
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    name, chosen_by = args.method, "--method"
    if name is None:
        name, chosen_by = read_settings(sources).get("method", Model.method), "the model's default"
    method = METHODS[name]
    if prompt != settings["prompt"]:
        method = replace(moved_once(method), edit_step=1, replay=False)
    if args.edit_step is not None:
        method = replace(method, edit_step=args.edit_step)
    if args.start == "noise":
        parts = None if args.edit_step is None else method.parts
        method = replace(moved_once(method), start="noise", parts=parts, replay=False)
    if args.no_edit:
        method = replace(method, parts=None)
    method = replace(method, insert=not args.no_insert)
    replay = method.replay if args.replay is None else args.replay
    method = replace(method, replay=replay and method.insert)
    if args.fixed_point is not None:
        method = replace(method, fixed_point=args.fixed_point)

    if not 1 <= method.edits_before(args.ddim_steps) <= args.ddim_steps:
        raise ValueError(f"--edit-step {args.edit_step}: there are steps 1 to {args.ddim_steps}")
    if ddim_timesteps(args.ddim_steps)[method.edits_before(args.ddim_steps) - 1] < HELD_UNTIL:
        method = moved_once(method)
    if method.start == "noise" and method.parts and method.edits_before(args.ddim_steps) == 1:
        raise ValueError(
            "--start noise --edit-step 1: at the first step that noise has nothing of the reference to be moved; "
            "give an --edit-step above 1"
        )
    if args.fixed_point is not None and not 0 <= args.fixed_point <= 20:
        raise ValueError(f"--fixed-point {args.fixed_point}: give a number from 0 to 20")
    if args.replay and args.no_insert:
        raise ValueError("--replay: replays the key frame, which --no-insert leaves out")
    return method, chosen_by


def plan(args: argparse.Namespace, run: Run, method: Method, targets: int) -> None:
    """Prints the size of the task and what it takes, without weights or a graphics card."""
    # The pseudo video is encoded, and so are the training frames that it is made of.
    holds = method.parts and method.editor is hold_to_pseudo_video
    encoded = 1 + len(run.frames) + targets if holds else 1
    frames = targets + method.insert
    settings = run.settings
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    model = SimpleNamespace(**networks_without_weights(sources))
    parameters = sum(p.numel() for network in vars(model).values() for p in network.parameters())
    height, width = (side // model.vae.config.factor for side in run.frames.shape[1:3])
    step, encoding, decoding = operations(model, height, width)
    until = read_settings(sources).get("guidance_until", 0) if args.guidance != 1 else TRAIN_STEPS
    # A guided step predicts the noise twice.
    passes = args.ddim_steps + sum(t >= until for t in ddim_timesteps(args.ddim_steps))
    inversions = 1 + method.fixed_point if method.needs_inversion else 0
    print(f"{frames} frames of {run.frames.shape[2]}x{run.frames.shape[1]}, {parameters:,} parameters")
    work = {
        "encoding": encoding * encoded,
        "inversion": step * args.ddim_steps * inversions,
        # Where the key frame is replayed, the reference is also sampled alone, for the report.
        "sampling": step * (passes * frames + args.ddim_steps * method.replay),
        "decoding": decoding * frames,
    }
    for name, count in work.items():
        print(f"{name}: {count / 1e12:,.1f} TFLOP")
    device, dtype = compute_device()
    places = {device.type: (device, dtype, "never" if args.offload == "auto" else args.offload)}
    for offload in ("never", "always"):
        if args.offload in ("auto", offload):
            places[f"graphics card, --offload {offload}"] = CUDA, torch.float16, offload
    for name, (where, precision, offload) in places.items():
        peak = sampling_peak(
            model, frames, height, width, precision, args.guidance, args.slice, offload, where
        )
        precision = str(precision).removeprefix("torch.")
        print(f"{name}, {precision}: {peak / 1e9:.1f} GB at the peak")
    seconds = seconds_per_frame(model, height, width, device, dtype, args.slice)
    minutes = seconds * sum(work.values()) / step / 60
    print(f"on this machine's {device.type}: about {minutes:,.1f} minutes, from a trial of one slice")


# ---- What is done -------------------------------------------------------------------------------


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that makes no sense."""
    ddim_timesteps(args.ddim_steps)
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f"--fps {args.fps:g}: give a number above 0")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance:g}: give a number such as 1 or 3")
    if args.slice is not None and args.slice < 1:
        raise ValueError(f"--slice {args.slice}: give a number above 0")


def read_targets(args: argparse.Namespace, run: Run) -> tuple[Driver, list[Pose], dict[str, float] | None]:
    """The driver, its poses on the run's canvas as they will be followed, and how they were retargeted, if so."""
    driver = read_driver(
        args.poses,
        args.poses_are,
        args.range,
        run.settings["model"],
        run.folder / "poses",
        args.person,
        args.smooth,
        canvas=args.canvas,
    )
    if args.canvas and driver.fps:
        raise ValueError(f"{args.poses}: --canvas is for JSON; footage has a size of its own")
    targets = place_targets(driver, args.poses, run)
    own = is_training_clip(args.poses, run.settings)
    if args.retarget is False or (args.retarget is None and own):
        return driver, targets, None
    height, width = run.frames.shape[1:3]
    try:
        ratios = proportions(targets, run.poses, width / height)
    except ValueError as error:
        raise ValueError(f"{args.poses}: {error}; --no-retarget follows it literally") from None
    return driver, retarget(targets, run.poses, width / height), ratios


def load_tuned(run: Run) -> Model:
    """The model with the run's weights, on the device that is there."""
    device, dtype = compute_device()
    settings = run.settings
    model = load_model(settings["model"], settings["controlnet"], settings["vae"], device, dtype)
    load_trained(model, run.folder / "trained.safetensors")
    for used_now_and_then in (model.vae, model.text_encoder):
        used_now_and_then.to("cpu")  # and on the device only while it is used
    return model


def write_result(
    args: argparse.Namespace,
    out: Path,
    run: Run,
    driver: Driver,
    targets: Sequence[Pose],
    frames: Iterable[np.ndarray],
    report: dict,
) -> np.ndarray:
    """Writes video, contact sheet, poses and report, which gets what is known only now; returns the frames."""
    height, width = run.frames.shape[1:3]
    out.parent.mkdir(parents=True, exist_ok=True)
    fps, written = args.fps or driver.fps or run.settings["fps"], []
    with open_video(out, fps, height, width) as write:
        for frame in tqdm(frames, desc="decoding", total=len(targets)):
            write(frame)
            written.append(frame)
    # At another speed the sound would run away from the movements.
    sound = fps == driver.fps and not args.no_audio and has_sound(args.poses)
    if sound:
        try:
            add_sound(out, args.poses, driver.within.start / fps, len(written) / fps)
        except OSError as error:  # which is no reason to leave the rest unwritten
            sound = False
            print(f"{out}: without sound: {error}")
    # As they were followed: in this person's proportions and on this canvas.
    save_poses(out.with_suffix(".poses.json"), targets, width, height)
    drawn = [draw_pose(pose, height, width) for pose in targets]
    save_image(out.with_suffix(".png"), contact_sheet({"pose": drawn, "result": written}))
    report = {"frames": len(written), "fps": fps, "sound": sound} | report
    write_json(out.with_suffix(".json"), report)
    return np.stack(written)


def main(args: argparse.Namespace) -> np.ndarray | None:
    """Does what the command line says; returns the frames (F, H, W, 3) uint8, as before compression."""
    check_numbers(args)
    run = load_run(args.run or newest_run())
    settings = run.settings
    prompt = settings["prompt"] if args.prompt is None else args.prompt
    method, chosen_by = choose_method(args, settings, prompt)
    out = args.out or run.folder / "samples" / f"{name_of(args.poses)}.mp4"
    inputs = [Path(settings[name]) for name in ("clip", "poses") if settings[name]]
    check_out(out, [args.poses, *inputs])
    driver, targets, ratios = read_targets(args, run)
    k = choose_reference(args.reference, run, targets)
    if args.plan:
        plan(args, run, method, len(targets))
        return None

    model = load_tuned(run)
    holds = method.parts and method.editor is hold_to_pseudo_video
    if holds and background_change(run.frames, run.poses, model.vae.config.factor) > STILL:
        print(
            "the training frames show no still background: parts are moved once, the rest is left to the model"
        )
        method = moved_once(method)
    rate, rate_from = settings["learning_rate"], settings.get("learning_rate_from", "unknown")
    print(f"trained at a learning rate of {rate:g} ({rate_from})")
    print(f"method {method.name} ({chosen_by}), {args.ddim_steps} steps, on {describe(model)}")
    made = generate_or_explain(args, run, targets, method, k, model, prompt)
    report = {
        "run": str(run.folder),
        "poses": str(args.poses),
        "retargeted": ratios is not None,
        "proportions": ratios,  # the subject's to the driver's
        "prompt": prompt,
        "guidance": args.guidance,
        "guidance_until": model.guidance_until,
        "ddim_steps": args.ddim_steps,
        "method": method.name,
        "method_from": chosen_by,
        "learning_rate": rate,
        "learning_rate_from": rate_from,
        "edit": method.parts.__name__ if method.parts else None,
        "edit_step": method.edits_before(args.ddim_steps) if method.parts else None,
        "start": method.start,
        "seed": args.seed,
        "inserted": method.insert,
        "replay": method.replay,
        "fixed_point": method.fixed_point,
        "reference": settings["frames"][k],
        # Sampled as key frame; alone, and so without replay, where the key frame is replayed.
        "reference_psnr": faithfulness(model, made, run.frames[k]),
        "edited_regions": made.regions,
    }
    frames = write_result(args, out, run, driver, targets, decode_latents(model, made.latents), report)
    print(f"{out}: {len(frames)} frames, from training frame {report['reference']}; look at {out.stem}.png")
    return frames


def faithfulness(model: Model, made: Generated, reference: np.ndarray) -> float | None:
    """PSNR in dB of the reference as sampling gives it back; None where it was not inserted."""
    if made.reconstruction is None:
        return None
    (frame,) = decode_latents(model, made.reconstruction)
    error = (frame.astype(np.float64) - reference) ** 2 / 255**2
    return -10 * math.log10(max(error.mean(), 1e-10))


def generate_or_explain(
    args: argparse.Namespace,
    run: Run,
    targets: list[Pose],
    method: Method,
    k: int,
    model: Model,
    prompt: str,
) -> Generated:
    """`generate` as the command line says. Raises MemoryError with how much would do."""
    try:
        return generate(
            model,
            run,
            targets,
            method,
            k,
            args.ddim_steps,
            run.settings["prompt"],
            prompt,
            args.guidance,
            args.seed,
            args.slice,
            args.offload,
        )
    except MemoryError as error:
        frames = len(targets) + method.insert
        size = (side // model.vae.config.factor for side in run.frames.shape[1:3])
        dtype = model.unet.conv_in.weight.dtype
        offload = "never" if args.offload == "never" else "always"
        peak = sampling_peak(model, frames, *size, dtype, args.guidance, args.slice or 1, offload)
        raise MemoryError(f"{error}; {frames} frames need about {peak / 1e9:.1f} GB") from None


if __name__ == "__main__":
    run_command("sample.py", main, args, out_of_memory="frames of this size need a larger card")
