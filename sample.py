"""Makes a video of the person of a run, following any poses: `python sample.py --poses dance.mp4`.

Writes, side by side: the video, a contact sheet (target pose, result), the poses as they were followed, a page
that shows all of it, and the report: the settings, what happened, and the hashes of these files.
"""

from command import sampling_arguments
from safe.process import before_torch, run_command, stop_in_one_line

if __name__ == "__main__":  # before the imports below, which take seconds
    stop_in_one_line("sample.py")
    args = sampling_arguments()
    before_torch()

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from beyond.follow import follow
from beyond.plan import print_plan, sampling_peak
from beyond.pseudo import HELD_UNTIL, METHODS, STILL, background_change, hold_to_pseudo_video
from beyond.ranks import decode, in_ranks, is_first, share_frames
from beyond.reuse import reuse_deep_maps
from checkpoint import Model, find_parts, load_model, read_settings
from device import compute_device, describe
from pictures.pages import PAGE, result_data, write_page
from pictures.sheets import contact_sheet
from posecrafter import Generated, Method, ddim_timesteps, decode_latents, generate, select_reference
from poses.pose import Pose, absences, draw_pose, save_poses
from poses.source import Driver, read_driver
from public.adapters import recall_loras
from public.places import PARTS, locate_parts, weight_file
from run import Run, load_run, load_trained, name_of, newest_run
from safe.files import require_space
from safe.provenance import comment, mark_video, png_marks
from safe.results import claiming, replacing_result, report_of, write_report
from safe.settings import inputs_of, mark_of
from safe.sound import add_sound, has_sound
from video import VIDEOS_WRITTEN, save_image, write_video

# Instead of being held to a pseudo video: parts are moved once, and the rest is left to the model.
MOVED_ONCE = {"name": "body", "editor": METHODS["body"].editor}


def choose_method(args: Namespace, settings: dict, prompt: str) -> tuple[Method, str]:
    """The method that the options make, and whose choice its name is.

    A prompt of one's own wants something else than the training frames show. So nothing is held to them then, and
    the key frame, which all frames take their looks from, is not replayed unless that is asked for.
    Raises ValueError for options that do not go together.
    """
    if args.replay and args.no_insert:
        raise ValueError("--replay: replays the key frame, which --no-insert leaves out")
    timesteps = ddim_timesteps(args.ddim_steps)
    sources = locate_parts(settings["model"], settings["controlnet"], settings["vae"])
    name = args.method or read_settings(sources).get("method", Model.method)
    own_looks, from_noise = prompt != settings["prompt"], args.start == "noise"
    changes = {"start": args.start, "insert": not args.no_insert}
    if own_looks:
        changes["edit_step"] = 1
    if own_looks or from_noise or args.no_insert:
        changes["replay"] = False
    if args.no_edit or (from_noise and args.edit_step is None):
        changes["parts"] = None
    asked = {name: getattr(args, name) for name in ("edit_step", "fixed_point", "replay")}
    changes |= {name: value for name, value in asked.items() if value is not None}
    method = replace(METHODS[name], **changes)

    step = method.step_of_edit(args.ddim_steps)
    if not 1 <= step <= args.ddim_steps:
        raise ValueError(f"--edit-step {args.edit_step}: there are steps 1 to {args.ddim_steps}")
    if from_noise and method.parts and step == 1:
        nothing = "at the first step that noise has nothing of the reference to be moved"
        raise ValueError(f"--start noise --edit-step 1: {nothing}; give an --edit-step above 1")
    never_held = own_looks or from_noise or timesteps[step - 1] < HELD_UNTIL
    if never_held and method.editor is hold_to_pseudo_video:
        method = replace(method, **MOVED_ONCE)
    return method, "--method" if args.method else "the model's default"


def read_targets(args: Namespace, run: Run) -> tuple[Driver, list[Pose], dict | None, list[str]]:
    """The driver; its poses on the run's canvas as they will be followed, how they were retargeted, and remarks.

    The driver covers the canvas as the training frames did. Raises ValueError for frames without a person.
    """
    looking = run.settings["model"], args.device, run.folder / "poses", args.person, args.smooth
    driver = read_driver(args.poses, args.poses_are, args.range, *looking, canvas=args.canvas)
    if args.canvas and driver.fps:
        raise ValueError(f"{args.poses}: --canvas is for JSON; footage has a size of its own")
    if missing := absences(driver.poses, driver.within.start):
        advice = "leave them out with --range, fill them in, or try --person 2"
        raise ValueError(f"{args.poses}: no person in frames {missing}; {advice}")
    return driver, *follow(args, run, driver)


def choose_reference(text: str, run: Run, targets: list[Pose]) -> int:
    """ "auto" or a training frame's number -> its position among the training frames."""
    if text == "auto":
        return select_reference(run.poses, targets)
    numbers = [str(index) for index in run.settings["frames"]]
    if text not in numbers:
        advice = f"give auto or one of the training frames, {', '.join(numbers)}"
        raise ValueError(f"--reference {text}: {advice}")
    return numbers.index(text)


def load_tuned(run: Run, on: str) -> tuple[Model, dict[str, Path]]:
    """The model with the run's weights, on the device that `on` names, and the files that they came from."""
    (device, dtype), trained = compute_device(on), run.folder / "trained.safetensors"
    names, half = [run.settings[part] for part in ("model", "controlnet", "vae")], dtype != torch.float32
    loras = recall_loras(run.settings)
    model, sources = load_model(*names, device, dtype, loras), find_parts(*names, half)
    load_trained(model, trained)
    for used_now_and_then in (model.vae, model.text_encoder):
        used_now_and_then.to("cpu")  # and on the device only while it is used
    return model, {part: weight_file(sources[part], half) for part in PARTS} | {"trained": trained}


def generate_or_explain(model: Model, run: Run, poses: list[Pose], method: Method, **options) -> Generated:
    """`generate`. Raises MemoryError with how much memory would do, and FloatingPointError with what may help."""
    try:
        return generate(model, run, poses, method, **options)
    except FloatingPointError as error:
        advice = "give a --guidance nearer to 1, or train again with a lower --lr"
        raise FloatingPointError(f"{run.folder}: {error}; {advice}") from None
    except MemoryError as error:
        least = options["frames_per_slice"] or 1, "never" if options["offload"] == "never" else "always"
        frames, dtype = len(poses) + method.insert, model.unet.conv_in.weight.dtype
        size = (side // model.vae.config.factor for side in run.frames.shape[1:3])
        peak = sampling_peak(model, frames, *size, dtype, options["guidance"], *least)
        raise MemoryError(f"{error}; {frames} frames need about {peak / 1e9:.1f} GB") from None


def reference_psnr(model: Model, made: Generated, reference: np.ndarray) -> float | None:
    """PSNR in dB of the reference as sampling gives it back; None where it was not inserted."""
    if made.reconstruction is None:
        return None
    (frame,) = decode_latents(model, made.reconstruction)
    error = ((frame.astype(float) - reference) ** 2 / 255**2).mean()
    return -10 * math.log10(max(error, 1e-10))


def write_result(
    args: Namespace, out: Path, run: Run, driver: Driver, poses: list[Pose], made: Iterator, report: dict
) -> np.ndarray:
    """Writes the video while it is decoded, then poses, sheet and report, as one set. Returns the frames."""
    height, width = run.frames.shape[1:3]
    frames = np.empty((len(poses), height, width, 3), np.uint8)

    def kept() -> Iterator[np.ndarray]:
        for frame, place in zip(tqdm(made, desc="decoding", total=len(frames)), frames):
            place[:] = frame
            yield frame

    fps, manifest = args.fps or driver.fps or run.settings["fps"], report["manifest"]
    with replacing_result(out) as folder:
        place = folder / out.name
        write_video(place, kept(), fps, comment(manifest))
        sound = bool(driver.fps) and not args.no_audio and has_sound(args.poses)
        if sound and not math.isclose(fps, driver.fps, rel_tol=1e-3):
            sound = False
            print(f"{out}: without sound, which would not fit the movements at --fps {fps:g}")
        if sound:
            try:
                add_sound(place, args.poses, driver.within.start / driver.fps, len(frames) / fps)
            except OSError as error:  # which is no reason to leave the rest unwritten
                sound = False
                print(f"{out}: without sound: {error}")
        mark_video(place, manifest)
        whose = mark_of(run.frames)
        save_poses(place.with_suffix(".poses.json"), poses, width, height, proportions_of=whose)
        rows = {"pose": [draw_pose(pose, height, width) for pose in poses], "result": frames}
        save_image(place.with_suffix(".png"), contact_sheet(rows), pnginfo=png_marks(manifest))
        report |= {"frames": len(frames), "fps": fps, "sound": sound}
        if not args.no_report:
            write_page(place.with_suffix(PAGE), result_data(args, place, run, driver, poses, report))
        write_report(place, report)
    return frames


def main(args: Namespace) -> np.ndarray | None:
    """Does what the command line says; returns the frames (F, H, W, 3) uint8, as before compression."""
    run = load_run(args.run or newest_run())
    recall_loras(run.settings)  # here, before poses are looked for, one that has changed is told
    prompt = run.settings["prompt"] if args.prompt is None else args.prompt
    method, method_from = choose_method(args, run.settings, prompt)
    out = args.out or run.folder / "samples" / f"{name_of(args.poses)}.mp4"
    claimed = claiming(out, VIDEOS_WRITTEN, [args.poses, *inputs_of(run.settings)])
    with claimed if is_first() else nullcontext():
        return make_result(args, out, run, prompt, method, method_from)


def make_result(
    args: Namespace, out: Path, run: Run, prompt: str, method: Method, method_from: str
) -> np.ndarray | None:
    """`main`, once it is clear what is to be made and where."""
    driver, targets, ratios, remarks = read_targets(args, run)
    k = choose_reference(args.reference, run, targets)
    if args.plan:
        print_plan(run, method, len(targets), args)
        return None
    # At the most: the video, once more with its sound, and the sheet. All are compressed.
    require_space(out.parent, 2 * len(targets) * run.frames[0].nbytes)
    share = share_frames(len(targets) + method.insert)

    model, weights = load_tuned(run, args.device)
    held = method.parts and method.editor is hold_to_pseudo_video
    if held and background_change(run.frames, run.poses, model.vae.config.factor) > STILL:
        moving = "the training frames show no still background"
        remarks.append(f"{moving}: parts are moved once, the rest is the model's")
        print(remarks[-1])
        method = replace(method, **MOVED_ONCE)
    print("trained at a learning rate of {learning_rate:g} ({learning_rate_from})".format_map(run.settings))
    print(f"method {method.name} ({method_from}), {args.ddim_steps} steps, on {describe(model)}")
    options = {"guidance": args.guidance, "seed": args.seed, "steps": args.ddim_steps}
    options |= {"frames_per_slice": args.slice, "offload": args.offload, "share": share}
    options["predictor"] = args.reuse and reuse_deep_maps(args.reuse, args.ddim_steps)
    options |= {"reference": k, "source": run.settings["prompt"], "prompt": prompt}
    made = generate_or_explain(model, run, targets, method, **options)
    report = report_of(args, run, prompt, method, k, model.guidance_until, weights)
    report |= {
        "method_from": method_from,
        "retargeted": bool(ratios),
        "proportions": ratios,
        # Sampled as key frame; alone, and so without replay, where the key frame is replayed.
        "reference_psnr": reference_psnr(model, made, run.frames[k]),
        "edited_regions": made.regions,
        "remarks": remarks,
    }
    decoded = decode(model, made.latents, share)
    frames = write_result(args, out, run, driver, targets, decoded, report)
    look = f"look at {out.stem}{'.png' if args.no_report else PAGE}"
    print(f"{out}: {len(frames)} frames, from training frame {report['reference']}; {look}")
    return frames


if __name__ == "__main__":
    run_command("sample.py", in_ranks(main), args, out_of_memory="frames of this size need a larger card")
