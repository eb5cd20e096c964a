"""The whole pipeline: replay and fixed point, methods as data, and values that are not finite."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import posecrafter
from beyond.pseudo import BODY, HELD, METHODS
from checkpoint import load_model
from demo.puppet import clip
from posecrafter import (
    PAPER,
    Edits,
    decode_latents,
    embed_hints,
    encode_frames,
    encode_prompt,
    generate,
    invert,
    predict_noise,
    through_vae,
)

SIZE, STEPS = 64, 4


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def run():
    frames, poses, _ = clip(3, 6, 8, SIZE)
    return SimpleNamespace(frames=frames[::4], poses=poses[::4])


@pytest.fixture(scope="module")
def targets():
    return clip(3, 7, 9, SIZE)[1][::4]


def frame_zero(monkeypatch, *arguments) -> dict[int, torch.Tensor]:
    """Frame 0's latents at each timestep of a clip that `generate` samples."""
    seen = {}

    def spy(model, latents, timestep, *rest):
        if len(latents) > 1:
            seen[timestep] = latents[0].clone()
        return predict_noise(model, latents, timestep, *rest)

    monkeypatch.setattr(posecrafter, "predict_noise", spy)
    generate(*arguments, reference=0, steps=STEPS)
    monkeypatch.undo()
    return seen


def test_a_replayed_key_frame_goes_the_way_that_inversion_came(model, run, targets, monkeypatch):
    latent = encode_frames(model, run.frames[:1])
    hint = embed_hints(model, run.poses[:1], SIZE, SIZE)
    _, *levels = invert(model, latent, hint, encode_prompt(model, "a person"), STEPS)
    replayed = frame_zero(monkeypatch, model, run, targets, replace(PAPER, replay=True))
    sampled = frame_zero(monkeypatch, model, run, targets, PAPER)
    for (timestep, ours), level in zip(replayed.items(), reversed(levels), strict=True):
        assert torch.equal(ours, level[0]), timestep
    last = min(sampled)
    assert torch.equal(sampled[max(sampled)], levels[-1][0])
    assert not torch.allclose(sampled[last], levels[0][0], atol=1e-2), "it strays without replay"


def test_what_is_reported_of_the_reference_owes_nothing_to_replay(model, run, targets):
    with_replay = generate(model, run, targets, replace(PAPER, replay=True), 0, STEPS)
    latent = encode_frames(model, run.frames[:1])
    error = (with_replay.reconstruction - latent).abs().mean().item()
    assert error > 1e-3
    exact = replace(PAPER, replay=True, fixed_point=3)
    closer = generate(model, run, targets, exact, 0, STEPS).reconstruction
    assert (closer - latent).abs().mean() < error / 2
    assert generate(model, run, targets, replace(PAPER, insert=False), 0, 1).reconstruction is None


def test_methods_are_what_their_names_say():
    assert METHODS == {"paper": PAPER, "body": BODY, "held": HELD}
    assert [method.step_of_edit(50) for method in METHODS.values()] == [1, 11, 11]
    assert [BODY.step_of_edit(steps) for steps in (1, 4, 5, 10)] == [1, 1, 2, 3]
    assert not replace(PAPER, start="noise", parts=None).needs_inversion
    assert replace(PAPER, start="noise").needs_inversion


def test_an_editor_sees_the_target_frames_alone(model, run, targets):
    shapes, finished = [], []

    def editor(scene):
        assert scene.edit_step == 1 and len(scene.trajectory) == STEPS + 1
        return Edits(
            lambda latents, step: shapes.append((step, len(latents))),
            lambda latents: finished.append(latents.fill_(7)),
            {"everything": len(scene.targets)},
        )

    made = generate(model, run, targets, replace(PAPER, editor=editor), 0, STEPS)
    assert shapes == [(step, len(targets)) for step in range(1, STEPS + 1)]
    assert (made.latents == 7).all() and made.latents.shape[0] == len(targets)
    assert not (made.reconstruction == 7).all()
    assert made.regions == {"everything": len(targets)} and len(finished) == 1


# ---- Values that are not finite -----------------------------------------------------------------


def overflowing(*dtypes: torch.dtype):
    """A `predict_noise` that overflows in these precisions while a clip is sampled."""

    def predict(model, latents, timestep, *rest):
        noise = predict_noise(model, latents, timestep, *rest)
        if model.unet.conv_in.weight.dtype in dtypes and len(latents) > 1:
            noise[0, 0, 0, 0] = float("inf")
        return noise

    return predict


@pytest.mark.slow
def test_sampling_that_overflows_in_float16_starts_again_in_a_wider_precision(
    run, targets, monkeypatch, capsys
):
    half = load_model("demo", dtype=torch.float16)
    monkeypatch.setattr(posecrafter, "predict_noise", overflowing(torch.float16))
    made = generate(half, run, targets, PAPER, 0, STEPS)
    assert "float16 overflowed; starting again in bfloat16" in capsys.readouterr().out
    wide = load_model("demo", dtype=torch.bfloat16)
    expected = generate(wide, run, targets, PAPER, 0, STEPS)
    assert (made.latents - expected.latents).abs().mean() < 0.1
    frames = list(decode_latents(half, made.latents))
    assert len(frames) == len(targets) and min(frame.std() for frame in frames) > 10

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    inputs = {"device": torch.device("cuda"), "dtype": torch.float16}
    monkeypatch.setattr(posecrafter, "network_inputs", lambda model: inputs)
    assert posecrafter.widen(half) == "float32", "cards before Ampere have no bfloat16"


def test_what_no_precision_helps_stops_with_one_line(model, run, targets, monkeypatch):
    monkeypatch.setattr(posecrafter, "predict_noise", overflowing(torch.float32))
    with pytest.raises(FloatingPointError, match="step 1 of sampling gave values that are not fin"):
        generate(model, run, targets, PAPER, 0, STEPS)


def test_a_vae_that_overflows_in_float16_goes_on_in_float32(capsys):
    vae = torch.nn.Linear(1, 1, bias=False).half()
    vae.weight.data.fill_(60000)
    assert through_vae(vae, vae, torch.full((1,), 2.0)) == 120000
    assert "goes on in float32" in capsys.readouterr().out
    assert vae.weight.dtype == torch.float32
    with pytest.raises(FloatingPointError, match="the VAE gave values that are not finite"):
        through_vae(vae, vae, torch.full((1,), float("nan")))
