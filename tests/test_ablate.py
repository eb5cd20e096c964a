"""The ablation: its warp, its statistics, what it reports and what it computes again."""

from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_parts import standing

from demo import ablate, cells
from demo.puppet import clip
from poses.parts import latent_points
from poses.pose import Pose, is_seen

SIDE = 32  # of the demo model's latents


def few(tmp_path, *options: str):
    """Arguments for one puppet and two short frames."""
    sizes = "--identities 1 --seeds 1 --sweep-identities 1 --target-frames 2 --ddim-steps 1"
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = [*sizes.split(), "--training-steps", "1", *folders, *options]
    return ablate.parse_arguments(command)[1]


def invent(every, work) -> None:
    """In place of `compute`: figures that differ from cell to cell, and grey frames."""
    for number, cell in enumerate(every):
        figures = {name: number / 8 for name in cells.FIGURES | cells.VIDEO_SIM}
        cells.save_cell(work, cell, figures, np.full((2, 128, 128, 3), 128, np.uint8))


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
    assert list(rows) == list(ablate.ROWS)
    added = []
    method = [asdict(rows[name]) for name in list(ablate.ROWS)[4:]]
    for before, after in pairwise(method):
        added.append([name for name in after if before[name] != after[name]])
    assert added == [["source"], ["insert"], ["edit", "edit_step"], ["edit"], ["hold"]]


def test_boxes_hold_their_keypoints_and_little_else():
    _, poses, _ = clip(3, 6, 3)
    masks = cells.boxes(poses, ["left_hand"])
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
    rows = dict.fromkeys(ablate.ROWS, np.array([10.0, 20.0, 30.0]))
    rows[ablate.FULL] = rows[ablate.FULL] + 1
    values = {name: dict.fromkeys(ablate.FIGURES, row) for name, row in rows.items()}
    differences = ablate.pairs(values)
    assert ablate.interval(differences["full − + insertion"]["psnr"]) == (1, 0)
    assert ablate.interval(differences["+ insertion − + selection and inversion"]["psnr"]) == (0, 0)
    table = ablate.markdown_table(differences, "", ablate.FIGURES, signed=True)
    assert "| full − copy | **+1.00 ± 0.00** |" in table
    assert "| + insertion − + selection and inversion | +0.00 ± 0.00 |" in table


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
    assert "puppets 0;" in text and "puppets 0, 1" not in text
    assert "## DDIM steps" in text and "--parts main steps" in text
    assert "Learning rate" not in text and "results_alpha" not in text
    assert {path.name for path in args.out.iterdir()} == {"RESULTS.md", "results_sheet.png"}


def test_what_has_been_computed_is_not_computed_again(tmp_path, monkeypatch):
    computed = []

    def compute(every, work, processes) -> None:
        computed.extend(every)
        invent(every, work)

    monkeypatch.setattr(ablate, "compute", compute)
    for part in ("interpolation", "main", "interpolation"):
        ablate.main(few(tmp_path, "--parts", part))
    assert len(computed) == len(set(computed)) == 11  # 10 rows and the nearest pixel's


def test_a_puppet_goes_through_all_rows(tmp_path):
    """The real thing, cut short: 1 training step, 1 sampling step, 2 frames."""
    args = few(tmp_path, "--parts", "main")
    ablate.main(args)
    (rows,) = ablate.plan(args)["main"]
    found = {name: cells.load_figures(args.work, cell) for name, cell in rows.items()}
    assert found[ablate.WARP]["psnr_person"] > found[ablate.COPY]["psnr_person"] + 1
    assert np.isfinite([list(figures.values()) for figures in found.values()]).all()
    assert len(list((args.work / "trained").glob("*.safetensors"))) == 1
    assert "| + latent editing | " in (args.out / "RESULTS.md").read_text()


def test_words_and_harder_poses_are_measured_too(monkeypatch, tmp_path):
    ways = {way: ablate.WORDS[way] for way in (ablate.NOT_TOLD, ablate.GUIDED)}
    monkeypatch.setattr(ablate, "WORDS", ways)
    args = few(tmp_path, "--parts", "harder", "attributes")
    ablate.main(args)
    harder, attributes = (ablate.plan(args)[part][0] for part in ("harder", "attributes"))
    kinds = {(cell.dance, cell.driver) for cell in harder.values()}
    facing = {("facing", "literal"), ("facing", "retargeted")}
    assert kinds == {("turning", "own"), ("crossed", "own")} | facing
    for cell in attributes.values():
        figures = cells.load_figures(args.work, cell)
        assert 0 < figures["colour"] < 442 and figures["psnr_elsewhere"] > 5
    assert cells.repaint(attributes["hair, guidance 3"])[1] == "red hair"
    text = (args.out / "RESULTS.md").read_text()
    assert (args.out / "results_words.png").exists()
    assert "| turning: held to the pseudo video − full | " in text and "| hair, guidance 3 | " in text


def test_several_processes_compute_the_same_cells(tmp_path):
    args = few(tmp_path, "--parts", "interpolation", "--sweep-identities", "2")
    args.processes = 2
    ablate.main(args)
    for points in ablate.plan(args)["interpolation"]:
        assert all(cells.cell_path(args.work, cell).exists() for cell in points.values())
