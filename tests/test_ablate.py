"""The ablation: its warp, its statistics, what it reports and what it computes again."""

from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_parts import standing

from demo import ablate, cells
from demo.puppet import clip
from demo.scene import set_scene
from poses.parts import latent_points
from poses.pose import Pose, is_seen

SIDE = 32  # of the demo model's latents


def few(tmp_path, *options: str):
    """Arguments for one puppet and two short frames."""
    sizes = "--identities 1 --target-frames 2 --ddim-steps 1 --training-steps 1"
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return ablate.parse_arguments([*sizes.split(), *folders, *options])


def invent(trials, work) -> None:
    """In place of `compute`: figures that differ from trial to trial, and grey frames."""
    for number, trial in enumerate(trials):
        figures = {name: number / 8 for name in list(cells.FIGURES)[:-2]}
        cells.save_cell(work, trial, figures, np.full((2, 128, 128, 3), 128, np.uint8))


# ---- The warp


def test_a_puppet_in_its_own_pose_is_left_as_it_is():
    _, (pose,), _ = clip(3, 6, 1)
    latent = torch.randn(4, SIDE, SIDE)
    warped = cells.warp_body(latent, pose, pose, torch.zeros_like(latent))
    assert torch.allclose(warped, latent, atol=1e-4)


def test_a_limb_moves_with_its_bone_and_uncovers_what_was_behind_it():
    down, outwards = standing((0.3, 0.75)), standing((0.05, 0.5))
    latent, behind = torch.zeros(4, SIDE, SIDE), torch.full((4, SIDE, SIDE), -1.0)
    latent[:, 17:23, 8:11] = 5  # the forearm that hangs
    warped = cells.warp_body(latent, down, outwards, behind)

    def middle(pose: Pose) -> tuple[int, int]:
        x, y = latent_points(pose.body, SIDE, SIDE)[[3, 4]].mean(axis=0).round().astype(int)
        return y, x

    before, after = latent[0].round(), warped[0].round()
    assert (before[middle(down)], after[middle(down)]) == (5, -1)
    assert (before[middle(outwards)], after[middle(outwards)]) == (0, 5)
    far_from_the_arm = warped[:, :, 13:]
    assert torch.allclose(far_from_the_arm, latent[:, :, 13:], atol=1e-4)


# ---- What is compared


def test_each_row_of_the_method_adds_one_thing(tmp_path):
    (rows,) = ablate.plan(few(tmp_path))["main"]
    method = [asdict(trial)["way"] for trial in list(rows.values())[4:]]
    added = [[name for name in after if before[name] != after[name]] for before, after in pairwise(method)]
    body = ["name", "parts", "edit_step"]
    assert added == [["start"], ["insert"], ["parts"], body, ["name", "editor"]]


def test_trials_that_differ_are_kept_apart(tmp_path):
    trials = {trial for several in ablate.plan(few(tmp_path)).values() for trial in several[0].values()}
    assert len({cells.cell_path(tmp_path, trial) for trial in trials}) == len(trials) > 60


def test_boxes_hold_their_keypoints_and_little_else():
    _, poses, _ = clip(3, 6, 3)
    masks = cells.boxes(poses, ["left_hand"], 128)
    for mask, pose in zip(masks, poses):
        hand = pose.left_hand[is_seen(pose.left_hand), :2] * 128
        x, y = hand.astype(int).T
        assert mask[y, x].all()
        assert mask.sum() <= np.prod(np.ptp(hand, axis=0) + 2 * cells.MARGIN + 2)


# ---- The report


def test_the_interval_is_students():
    assert ablate.interval(np.array([1, 2, 3])) == pytest.approx((2, 4.30 / 3**0.5))
    mean, half = ablate.interval(np.array([5]))
    assert mean == 5 and np.isnan(half)


def test_differences_are_taken_puppet_by_puppet():
    """Puppets 10 dB apart, and a gain of 1 dB in all of them: no doubt about the gain."""
    same = np.repeat([[10.0], [20.0], [30.0]], len(ablate.FIGURES), axis=1)
    values = {row: same + (row == ablate.FULL) for row in ablate.MAIN}
    differences = ablate.differences(values, ablate.MAIN_PAIRS)
    assert ablate.interval(differences["+ latent editing − + insertion"][:, 0]) == (1, 0)
    assert ablate.interval(differences["+ insertion − + selection and inversion"][:, 0]) == (0, 0)
    table = ablate.markdown_table(differences, signed=True)
    assert "| + latent editing − copy | **+1.00 ± 0.00** |" in table
    assert "| + insertion − + selection and inversion | +0.00 ± 0.00 |" in table


def test_rows_are_compared_with_the_first_of_their_kind():
    names = ["paper: as it is", "paper: both", "held: as it is", "held: both"]
    assert list(ablate.differences(dict.fromkeys(names, np.zeros((1, 1))))) == [
        "paper: both − paper: as it is",
        "held: both − held: as it is",
    ]


def test_the_report_leaves_out_what_has_no_cells(tmp_path):
    args = few(tmp_path, "--identities", "2", "--only-report")
    ablate.main(args)
    assert not args.out.exists()

    parts = ablate.plan(args)
    invent(parts["main"][0].values(), args.work)
    invent(list(parts["main"][1].values())[1:], args.work)  # all but one row
    invent(parts["steps"][0].values(), args.work)
    ablate.main(args)
    text = (args.out / "RESULTS.md").read_text()
    assert "## main\n\n1 of 2 puppets" in text
    assert "## steps" in text and "| 20 steps − 10 steps | " in text
    assert "## rate" not in text and "colour ↓ |" not in text
    assert {path.name for path in args.out.iterdir()} == {"RESULTS.md", "sheet_main.png", "sheet_steps.png"}


def test_what_has_been_computed_is_not_computed_again(tmp_path, monkeypatch):
    computed = []

    def compute(trials, work) -> None:
        computed.extend(trials)
        invent(trials, work)

    monkeypatch.setattr(cells, "compute", compute)
    for part in ("interpolation", "main", "interpolation"):
        ablate.main(few(tmp_path, "--parts", part))
    assert len(computed) == len(set(computed)) == 11  # 10 rows and the nearest pixel's


@pytest.mark.slow
def test_a_puppet_goes_through_all_rows(tmp_path):
    """The real thing, cut short: 1 training step, 1 sampling step, 2 frames."""
    args = few(tmp_path, "--parts", "main")
    ablate.main(args)
    (rows,) = ablate.plan(args)["main"]
    found = {name: cells.load_figures(args.work, trial)[:-2] for name, trial in rows.items()}
    assert found[ablate.WARP][1] > found[ablate.COPY][1] + 1  # PSNR of the person
    assert np.isfinite(list(found.values())).all()
    assert len(list((args.work / "trained").glob("*.safetensors"))) == 1
    assert "| + latent editing | " in (args.out / "RESULTS.md").read_text()


@pytest.mark.slow
def test_words_and_harder_poses_are_measured_too(monkeypatch, tmp_path):
    told = {
        name: trial for name, trial in ablate.PARTS["attributes"].items() if name.endswith(("told", "3"))
    }
    monkeypatch.setitem(ablate.PARTS, "attributes", told)
    args = few(tmp_path, "--parts", "harder", "attributes")
    ablate.main(args)
    harder, attributes = (ablate.plan(args)[part][0] for part in ("harder", "attributes"))
    kinds = {(trial.dance, trial.driver) for trial in harder.values()}
    facing = {("facing", "literal"), ("facing", "retargeted")}
    assert kinds == {("turning", "own"), ("crossed", "own")} | facing
    for trial in attributes.values():
        colour, elsewhere = cells.load_figures(args.work, trial)[-2:]
        assert 0 < colour < 442 and elsewhere > 5
    assert set_scene(attributes["hair: guidance 3"]).prompt == "a person, red hair"
    text = (args.out / "RESULTS.md").read_text()
    assert (args.out / "sheet_attributes.png").exists()
    assert "| turning: held to the pseudo video − turning: + latent editing | " in text
    assert "| hair: guidance 3 | " in text
