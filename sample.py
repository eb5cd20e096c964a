"""Makes a video of the person of a run, following any poses: `python sample.py --poses dance.mp4`.

Writes, side by side: the video, a contact sheet (target pose, result), the poses as they were followed, and the
settings with what happened.
"""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import (
    compute_device,
    keep_freed_memory,
    load_model,
    locate_parts,
    networks_without_weights,
    read_settings,
)
from driver import Driver, read_driver
from evaluate import psnr
from memory import CUDA, operations, sampling_peak, seconds_per_frame
from parts import PARTS
from pose import Pose, absences, draw_pose, place_pose, save_poses
from posecrafter import (
    TRAIN_STEPS,
    ddim_timesteps,
    decode_latents,
    embed_hints,
    encode_frames,
    encode_prompt,
    finest_map,
    insert_reference,
    invert,
    sample,
    select_reference,
)
from pseudo import (
    HELD_UNTIL,
    STILL,
    background_change,
    best_edit_step,
    between_steps,
    pseudo_video,
    without_people,
)
from retarget import proportions, retarget
from slicing import plans
from train import (
    Run,
    add_pose_arguments,
    load_run,
    load_trained,
    name_of,
    newest_run,
    parse_canvas,
    parse_range,
)
from video import (
    VIDEOS_WRITTEN,
    add_sound,
    contact_sheet,
    cover,
    has_sound,
    open_video,
    replacing,
    save_image,
)


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
    written = [
        out.with_suffix(end).resolve() for end in (out.suffix, ".png", ".json", ".poses.json")
    ]
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


def parse_arguments(
    command: list[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--poses",
        type=Path,
        required=True,
        help="what to follow: OpenPose JSON, or a video or images of anyone, or of a drawn skeleton",
    )
    add_pose_arguments(parser)
    parser.add_argument(
        "--canvas",
        type=parse_canvas,
        metavar="WxH",
        help="size of the video that poses in pixels were found in, if their JSON does not say",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="take the jitter out of poses found in footage"
    )
    parser.add_argument(
        "--range", type=parse_range, metavar="A:B", help="only these frames of the poses"
    )
    parser.add_argument(
        "--retarget",
        action=argparse.BooleanOptionalAction,
        help="give the poses the proportions of the person of the run, and their place on the ground "
        "(default: unless they are the training clip's own)",
    )
    parser.add_argument(
        "--run", type=Path, help="run folder that train.py made (default: the newest)"
    )
    parser.add_argument(
        "--prompt",
        help="target prompt, such as 'a person, red hair' (default: the training prompt)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="guidance scale; 3 to change attributes (default: 1)",
    )
    parser.add_argument("--ddim-steps", type=int, default=50, help="sampling steps (default: 50)")
    parser.add_argument(
        "--edit",
        choices=(*PARTS, "none"),
        help="what latent editing moves into place; face,hands: as in the paper "
        "(default: body, and none with --start noise)",
    )
    parser.add_argument(
        "--edit-step",
        type=int,
        help="before which step it does (default: after a fifth of the steps; 1 for face,hands, "
        "and with a --prompt of its own, whose new looks later steps would undo)",
    )
    parser.add_argument(
        "--reference",
        default="auto",
        help="number of the training frame to start from (default: auto)",
    )
    parser.add_argument(
        "--no-insert", action="store_true", help="do not put the reference in front as key frame"
    )
    parser.add_argument(
        "--start",
        choices=("inversion", "noise"),
        default="inversion",
        help="where sampling starts from",
    )
    parser.add_argument(
        "--no-hold",
        action="store_true",
        help="let --edit body move the body's noise once, and leave the rest, the background too, to the model",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --start noise, and of the background's (default: 0)"
    )
    parser.add_argument(
        "--slice",
        type=int,
        metavar="N",
        help="frames that a layer takes at a time; the result does not depend on it",
    )
    parser.add_argument(
        "--offload",
        choices=("auto", "always", "never"),
        default="auto",
        help="keep what waits for the decoder outside the graphics card (default: auto, if need be)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="load no weights but OpenPose's, if poses must be found; print how much there is to compute, "
        "the memory and the time it takes",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="of the result (default: the driver's, or the training clip's if the driver is JSON)",
    )
    parser.add_argument("--no-audio", action="store_true", help="leave the driver's sound out")
    parser.add_argument(
        "--out", type=Path, help="the video to write (default: in the run's samples/)"
    )
    return parser, parser.parse_args(command)


def plan(args: argparse.Namespace, run: Run, encoded: int, frames: int) -> None:
    """Prints the size of the task and what it takes, without weights or a graphics card.

    encoded: how many training frames; frames: how many are sampled, with the reference.
    """
    settings = run.settings
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    model = SimpleNamespace(**networks_without_weights(sources))
    parameters = sum(p.numel() for network in vars(model).values() for p in network.parameters())
    height, width = (side // model.vae.config.factor for side in run.frames.shape[1:3])
    step, encoding, decoding = operations(model, height, width)
    until = read_settings(sources).get("guidance_until", 0) if args.guidance != 1 else TRAIN_STEPS
    # A guided step predicts the noise twice.
    passes = args.ddim_steps + sum(t >= until for t in ddim_timesteps(args.ddim_steps))
    inversion = args.start == "inversion" or args.edit != "none"
    print(
        f"{frames} frames of {run.frames.shape[2]}x{run.frames.shape[1]}, {parameters:,} parameters"
    )
    work = {
        "encoding": encoding * encoded,
        "inversion": step * args.ddim_steps if inversion else 0,
        "sampling": step * passes * frames,
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
            model,
            frames,
            height,
            width,
            precision,
            args.guidance,
            args.slice,
            offload,
            where,
        )
        precision = str(precision).removeprefix("torch.")
        print(f"{name}, {precision}: {peak / 1e9:.1f} GB at the peak")
    keep_freed_memory()
    seconds = seconds_per_frame(model, height, width, device, dtype, args.slice)
    minutes = seconds * sum(work.values()) / step / 60
    print(
        f"on this machine's {device.type}: about {minutes:,.1f} minutes, from a trial of one slice"
    )


def main(args: argparse.Namespace) -> np.ndarray | None:
    """Does what the command line says; returns the frames (F, H, W, 3) uint8, as before compression."""
    run = load_run(args.run or newest_run())
    settings = run.settings
    height, width = run.frames.shape[1:3]
    ddim_timesteps(args.ddim_steps)  # refuses a number that makes no schedule
    args.edit = args.edit or ("body" if args.start == "inversion" else "none")
    prompt = settings["prompt"] if args.prompt is None else args.prompt
    own_prompt = prompt != settings["prompt"]
    if args.edit_step is None:
        args.edit_step = 1 if own_prompt else best_edit_step(args.edit, args.ddim_steps)
    if not 1 <= args.edit_step <= args.ddim_steps:
        raise ValueError(f"--edit-step {args.edit_step}: there are steps 1 to {args.ddim_steps}")
    if args.start == "noise" and args.edit != "none" and args.edit_step == 1:
        raise ValueError(
            f"--start noise --edit {args.edit}: at the first step that noise has nothing of the reference to "
            "be moved; give an --edit-step above 1"
        )
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f"--fps {args.fps:g}: give a number above 0")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance:g}: give a number such as 1 or 3")
    out = args.out or run.folder / "samples" / f"{name_of(args.poses)}.mp4"
    check_out(
        out, [args.poses, *(Path(settings[name]) for name in ("clip", "poses") if settings[name])]
    )
    if args.slice is not None and args.slice < 1:
        raise ValueError(f"--slice {args.slice}: give a number above 0")

    driver = read_driver(
        args.poses,
        args.poses_are,
        args.range,
        settings["model"],
        run.folder / "poses",
        args.person,
        args.smooth,
        canvas=args.canvas,
    )
    if args.canvas and driver.fps:
        raise ValueError(f"{args.poses}: --canvas is for JSON; footage has a size of its own")
    targets, ratios = place_targets(driver, args.poses, run), None
    if args.retarget or (args.retarget is None and not is_training_clip(args.poses, settings)):
        try:
            ratios = proportions(targets, run.poses, width / height)
        except ValueError as error:
            raise ValueError(f"{args.poses}: {error}; --no-retarget follows it literally") from None
        targets = retarget(targets, run.poses, width / height)
    k = choose_reference(args.reference, run, targets)
    # A prompt of one's own wants something else than the training frames show, and a start from noise draws it.
    holding = args.edit == "body" and args.start == "inversion" and not own_prompt
    holding = holding and not args.no_hold
    holding = holding and ddim_timesteps(args.ddim_steps)[args.edit_step - 1] >= HELD_UNTIL
    if args.plan:
        encoded = len(run.frames) + len(targets) if holding else 1
        plan(args, run, encoded, len(targets) + (not args.no_insert))
        return None

    keep_freed_memory()
    device, dtype = compute_device()
    model = load_model(settings["model"], settings["controlnet"], settings["vae"], device, dtype)
    load_trained(model, run.folder / "trained.safetensors")
    for used_now_and_then in (model.vae, model.text_encoder):
        used_now_and_then.to("cpu")  # and on the device only while it is used

    if holding and background_change(run.frames, run.poses, model.vae.config.factor) > STILL:
        print(
            "the training frames show no still background: the body is moved once, the rest left to the model"
        )
        holding = False

    poses = targets if args.no_insert else insert_reference(run.poses[k], targets)
    hints = embed_hints(model, poses, height, width)
    source = encode_prompt(model, settings["prompt"])
    target = encode_prompt(model, prompt) if own_prompt else source
    if holding:
        encoded = encode_frames(model, run.frames)
        behind, known = without_people(encoded, run.poses)
        (background,) = decode_latents(model, behind[None])
        moved, shown = pseudo_video(run.frames, run.poses, k, targets, background, known)
        held, reference = (encode_frames(model, moved), shown, known), encoded[k : k + 1]
    else:
        held, reference = None, encode_frames(model, run.frames[k : k + 1])

    edit, edited = None, {}
    if args.start == "inversion" or args.edit != "none":
        reference_hint = embed_hints(model, [run.poses[k]], height, width)
        trajectory = invert(model, reference, reference_hint, source, args.ddim_steps)
    if args.edit != "none":
        places = targets, run.poses[k], args.edit
        edit, edited = between_steps(trajectory, *places, args.edit_step, held, args.seed)
    if args.start == "inversion":
        noise = trajectory[-1].expand(len(poses), -1, -1, -1)
    else:
        random = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(len(poses), *reference.shape[1:], generator=random).to(device)

    try:
        latents = sample(
            model,
            noise,
            hints,
            target,
            args.ddim_steps,
            args.guidance,
            encode_prompt(model, ""),
            edit,
            plans(device, dtype, finest_map(model, noise), args.slice, args.offload),
            model.guidance_until,
        )
    except MemoryError as error:
        offload = "never" if args.offload == "never" else "always"
        size, least = noise.shape[-2:], (args.guidance, args.slice or 1, offload)
        need = sampling_peak(model, len(poses), *size, dtype, *least) / 1e9
        raise MemoryError(f"{error}; {len(poses)} frames need about {need:.1f} GB") from None

    out.parent.mkdir(parents=True, exist_ok=True)
    frames = []
    decoded = decode_latents(model, latents)
    faithfulness = None if args.no_insert else psnr(next(decoded)[None], run.frames[k : k + 1])
    fps = args.fps or driver.fps or settings["fps"]
    with open_video(out, fps, height, width) as write:
        for frame in tqdm(decoded, desc="decoding", total=len(targets)):
            write(frame)
            frames.append(frame)
    # At another speed the sound would run away from the movements.
    sound = fps == driver.fps and not args.no_audio and has_sound(args.poses)
    if sound:
        try:
            add_sound(out, args.poses, driver.within.start / fps, len(frames) / fps)
        except OSError as error:  # which is no reason to leave the rest unwritten
            sound = False
            print(f"{out}: without sound: {error}")
    # As they were followed: in this person's proportions and on this canvas.
    save_poses(out.with_suffix(".poses.json"), targets, width, height)
    drawn = [draw_pose(pose, height, width) for pose in targets]
    save_image(out.with_suffix(".png"), contact_sheet({"pose": drawn, "result": frames}))
    report = {
        "run": str(run.folder),
        "poses": str(args.poses),
        "frames": len(frames),
        "fps": fps,
        "sound": sound,
        "retargeted": ratios is not None,
        "proportions": ratios,  # the subject's to the driver's
        "prompt": prompt,
        "guidance": args.guidance,
        "guidance_until": model.guidance_until,
        "ddim_steps": args.ddim_steps,
        "edit": args.edit,
        "edit_step": args.edit_step,
        "held": holding,
        "start": args.start,
        "seed": args.seed,
        "inserted": not args.no_insert,
        "reference": settings["frames"][k],
        "reference_psnr": faithfulness,
        "edited_regions": edited,
    }
    with replacing(out.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{out}: {len(frames)} frames, from training frame {report['reference']}; look at {out.stem}.png"
    )
    return np.stack(frames)


if __name__ == "__main__":
    parser, args = parse_arguments()
    try:
        main(args)
    except (MemoryError, OSError, ValueError) as error:
        parser.exit(2, f"sample.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "sample.py: stopped\n")
    except torch.OutOfMemoryError:  # in encoding or decoding: sampling knows ways around it
        parser.exit(
            2, "sample.py: out of graphics memory: frames of this size need a larger card\n"
        )
