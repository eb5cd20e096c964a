import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from footage import RATE, make_video, put_cover_first, sound_of, turn
from PIL import Image

from pictures.sheets import contact_sheet
from poses.pose import Pose, place_pose
from safe.sound import add_sound, has_sound
from video import fit, fit_frame, open_clip, read_frames, save_image, write_video

SHARED = Path(__file__).parents[2] / "shared"


def clip(count=12, height=48, width=64) -> np.ndarray:
    """Smooth frames, each with its own brightness: frame i has a mean of about 20 + 16 i."""
    y, x = np.mgrid[:height, :width]
    wave = 8 * np.sin(x / 7)[..., None] + 8 * np.cos(y / 9)[..., None] * (1, 0, -1)
    levels = 20 + 16 * np.arange(count)
    return (levels[:, None, None, None] + wave).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, clip(), 12)
    return path


# ---------------------------------------------------------------------------------------- video


def levels(path: Path) -> np.ndarray:
    """Which frames of `clip` these are, by their brightness."""
    return (read_frames(path)[0].mean(axis=(1, 2, 3)) - 21) / 16


def test_an_uneven_video_is_read_by_its_times_at_its_average_rate(tmp_path, capfd):
    """As phones film; here the second half is half as fast."""
    path = tmp_path / "uneven.mp4"
    times = np.array([0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16])
    make_video(path, clip(), times / 12)
    shown, rate = levels(path), read_frames(path)[1]
    assert 8 <= rate <= 9 and len(open_clip(path)) == len(shown) == 12
    stored = np.interp(shown, range(12), times) / 12  # when the frames that are read were shown
    assert np.abs(stored - np.arange(12) / rate).max() < 1 / rate
    said, nothing = capfd.readouterr()
    assert (
        said.count("\n") == 1
        and f"not evenly spaced in time; they are read by their times, at {rate:g}" in said
    )
    assert not nothing


@pytest.mark.parametrize("extension", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("rate", [12, 23.976, 25, 29.97, 30])
def test_every_stored_frame_of_an_even_video_is_read_once(tmp_path, capfd, extension, rate):
    """Also where its times are rounded, and where it claims 1000 frames per second, as browsers' recordings do."""
    path = tmp_path / f"clip.{extension}"
    make_video(path, clip(), np.arange(12) / rate, claimed=1000 if extension != "mp4" else round(rate))
    np.testing.assert_allclose(levels(path), range(12), atol=0.3)
    assert read_frames(path)[1] == pytest.approx(rate, rel=0.02) and not any(capfd.readouterr())


def test_one_frame_that_is_missing_is_filled_with_the_one_before(tmp_path):
    make_video(
        tmp_path / "gap.mkv", clip()[np.arange(12) != 6], np.delete(np.arange(12), 6) / 25, claimed=25
    )
    shown = levels(tmp_path / "gap.mkv")
    assert len(shown) in (11, 12) and np.abs(shown - np.linspace(0, 11, len(shown))).max() < 1.1


FLASH = 1.2  # seconds after the first picture, when it begins
TIMES = {
    "even": np.arange(60) / 25,
    "uneven": np.concatenate([np.arange(30) / 30, 1 + np.arange(8) / 8, 2 + np.arange(30) / 30]),
    "jittering": np.arange(60) / 25 + np.random.default_rng(0).uniform(-0.015, 0.015, 60).clip(0),
    "slowing": np.cumsum(np.linspace(1 / 40, 1 / 15, 60)) - 1 / 40,
}


@pytest.mark.parametrize("extension", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("spacing", TIMES)
@pytest.mark.parametrize("pictures_start", [0, 0.5])
def test_a_flash_and_its_click_stay_together(tmp_path, extension, spacing, pictures_start):
    """What `sample.py` does with a driver that follows its own frames, whole and from a later frame on."""
    source, times = tmp_path / f"source.{extension}", TIMES[spacing]
    frames = np.full((len(times), 32, 32, 3), 20, np.uint8)
    frames[(times >= FLASH) & (times < FLASH + 0.3)] = 250
    flash = times[times >= FLASH][0]
    sound = np.zeros(4 * RATE)
    click = round((flash + pictures_start) * RATE)
    sound[click : click + 480] = np.sin(np.arange(480) / 6)
    claimed = 25 if extension == "mp4" else 1000
    make_video(source, frames, times + pictures_start, sound, claimed=claimed)
    fps = read_frames(source)[1]
    for start in (0, 7):
        result = tmp_path / f"result{start}.mp4"
        followed, _ = read_frames(source, range(start, len(open_clip(source))))
        write_video(result, followed, fps)
        add_sound(result, source, start / fps, len(followed) / fps)
        again, fps_again = read_frames(result)
        seen = np.argmax(again.mean(axis=(1, 2, 3)) > 130) / fps_again
        heard = np.argmax(np.abs(sound_of(result)) > 0.2) / RATE
        assert len(again) == len(followed) and fps_again == pytest.approx(fps, rel=1e-3)
        assert abs(seen - heard) < 1 / fps, f"from frame {start}: flash {seen:.3f} s, click {heard:.3f} s"


def test_sound_that_starts_later_or_ends_sooner_is_silent_there(tmp_path):
    tone = np.sin(np.arange(RATE // 2) / 6)
    make_video(tmp_path / "source.mkv", clip(25), np.arange(25) / 12, tone, sound_start=0.75)
    write_video(tmp_path / "result.mp4", clip(25), 12)
    add_sound(tmp_path / "result.mp4", tmp_path / "source.mkv", 0, 25 / 12)
    heard = np.abs(sound_of(tmp_path / "result.mp4"))
    assert len(heard) == pytest.approx(25 / 12 * RATE, abs=2048)
    assert abs(np.argmax(heard > 0.2) / RATE - 0.75) < 0.03
    assert heard[int(0.9 * RATE) : int(1.2 * RATE)].mean() > 0.3
    assert heard[: int(0.7 * RATE)].max() < 0.05 > heard[int(1.35 * RATE) :].max()


def test_a_cover_picture_is_no_frame_wherever_it_stands(tmp_path):
    cover = np.full((80, 96, 3), 200, np.uint8)
    for name in ("last", "first"):
        make_video(tmp_path / f"{name}.mp4", clip(), np.arange(12) / 25, cover=cover)
    put_cover_first(tmp_path / "first.mp4")
    for name in ("last", "first"):
        frames, fps = read_frames(tmp_path / f"{name}.mp4")
        assert frames.shape == (12, 48, 64, 3) and fps == 25
        np.testing.assert_allclose(levels(tmp_path / f"{name}.mp4"), range(12), atol=0.3)


@pytest.mark.parametrize(("aspect", "shape"), [((4, 3), (48, 85)), ((3, 4), (64, 64)), ((1, 1), (48, 64))])
def test_pixels_that_are_not_square_are_shown_as_they_should_be(tmp_path, aspect, shape):
    make_video(tmp_path / "clip.mp4", clip(), np.arange(12) / 25, pixel_aspect=Fraction(*aspect))
    frames, _ = read_frames(tmp_path / "clip.mp4")
    assert frames.shape == (12, *shape, 3)
    np.testing.assert_allclose(levels(tmp_path / "clip.mp4"), range(12), atol=0.3)


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),  # a mirrored selfie
    ],
)
def test_a_phone_s_video_is_set_upright(tmp_path, matrix, upright):
    corner = np.full((48, 64, 3), 60, np.uint8)
    corner[:16, :24] = (200, 40, 40)
    make_video(tmp_path / "phone.mp4", [corner] * 3, np.arange(3) / 25)
    turn(tmp_path / "phone.mp4", *matrix)
    frame, expected = read_frames(tmp_path / "phone.mp4")[0][0], upright(corner)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 4


def test_a_video_that_claims_huge_frames_is_refused_at_once(tmp_path, monkeypatch):
    path = tmp_path / "huge.webm"
    make_video(path, clip(3), np.arange(3) / 25)
    key_frame, size = b"\x9d\x01\x2a", (64).to_bytes(2, "little") + (48).to_bytes(2, "little")
    content = path.read_bytes()
    assert key_frame + size in content
    path.write_bytes(content.replace(key_frame + size, key_frame + b"\xff\x3f" * 2))
    with pytest.raises((OSError, ValueError), match=r"huge\.webm: [^\n]*$"):
        read_frames(path)
    monkeypatch.setattr("safe.room.free_memory", lambda device: 10_000)
    path.write_bytes(content)
    with pytest.raises(
        MemoryError, match=r"huge\.webm: 3 frames of 64x48 need at least .* give a shorter --range"
    ):
        read_frames(path)


@pytest.mark.parametrize("name", ["clip.ts", "clip.m4v", "clip.gif", "12:30.mp4", "clip", "clip.avi"])
def test_a_video_s_name_does_not_matter(tmp_path, monkeypatch, name):
    """Nor a colon in a relative path, where libav would see a protocol."""
    monkeypatch.chdir(tmp_path)
    codecs = {"clip.gif": {"codec": "gif", "pixels": "rgb8"}, "clip.avi": {"codec": "mpeg4"}}
    container = "mp4" if name == "clip" else None
    make_video(
        tmp_path / name, clip(), np.arange(12) / 12, claimed=12, container=container, **codecs.get(name, {})
    )
    assert len(open_clip(name)) == 12
    frames, fps = read_frames(name, [11, 3, 11])
    assert round(fps) == 12
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 20 + 16 * np.array([11, 3, 11]), atol=8)
    assert not has_sound(name)


def test_a_video_comes_back_as_it_was_written(video):
    frames, fps = read_frames(video)
    assert frames.shape == (12, 48, 64, 3) and frames.dtype == np.uint8 and fps == 12
    assert np.abs(frames.astype(int) - clip()).mean() < 2


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)])
def test_colours_come_back_as_they_were_written(tmp_path, colour):
    write_video(tmp_path / "flat.mp4", [np.full((32, 32, 3), colour, np.uint8)] * 3, 24)
    frames, _ = read_frames(tmp_path / "flat.mp4")
    assert np.abs(frames.astype(int) - colour).max() <= 4


def test_coloured_shapes_come_back_without_a_shift_or_fringes(tmp_path):
    y, x = np.mgrid[:96, :96]
    waves = np.stack([np.sin(x / 5), np.cos(y / 6), np.sin((x + y) / 7)], axis=2)
    frames = (128 + 80 * waves).astype(np.uint8)[None].repeat(3, axis=0)
    write_video(tmp_path / "waves.mp4", frames, 24)
    error = read_frames(tmp_path / "waves.mp4")[0].astype(int) - frames
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.4 and np.abs(error).mean() < 2


def test_asked_for_frames_come_in_the_order_asked_for(video):
    frames, _ = read_frames(video, [7, 0, 7, 3])
    levels = frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, 20 + 16 * np.array([7, 0, 7, 3]), atol=3)


def test_a_range_of_frames_can_be_asked_for(video):
    frames, _ = read_frames(video, range(2, 10, 3))
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 20 + 16 * np.array([2, 5, 8]), atol=3)


@pytest.mark.parametrize("index", [12, -1])
def test_an_index_outside_the_clip_is_an_error_that_says_how_long_it_is(video, index):
    with pytest.raises(ValueError, match=rf"clip\.mp4: has 12 frames .*no frame {index}"):
        read_frames(video, [0, index])


def test_what_is_not_a_video_is_named_in_one_line(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 999)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("noise.mp4", "empty.mp4", "notes.txt", "absent.mp4"):
        with pytest.raises(OSError) as error:
            read_frames(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)


def test_frames_are_written_as_they_come(tmp_path):
    """A long video is never held whole."""
    decoded = []

    def decode():
        for frame in clip(40):
            frame = frame.copy()
            decoded.append(weakref.ref(frame))
            assert sum(earlier() is not None for earlier in decoded) < 5
            yield frame

    write_video(tmp_path / "clip.mp4", decode(), 30)
    again, fps = read_frames(tmp_path / "clip.mp4")
    assert fps == 30 and len(again) == 40


def test_an_odd_size_is_padded_and_not_resized(tmp_path):
    frames = clip(height=47, width=63)
    write_video(tmp_path / "odd.mp4", frames, 24)
    again, _ = read_frames(tmp_path / "odd.mp4")
    assert again.shape == (12, 48, 64, 3)
    assert np.abs(again[:, :47, :63].astype(int) - frames).mean() < 2


def test_a_failed_write_leaves_the_old_video_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")

    def interrupted():
        yield from clip()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, interrupted(), 24)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"clip\.mp4: .*") as error:
            write_video(tmp_path / "clip.mp4", noise, 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    frames = clip()
    bad = [
        (tmp_path / "clip.xyz", frames, 24, "must end in"),
        (tmp_path / "clip.mp4", [], 24, "no frames"),
        (tmp_path / "clip.mp4", frames / 255, 24, "must be uint8"),
        (tmp_path / "clip.mp4", [frames[0], frames[1, :40]], 24, "must be uint8"),
    ]
    for path, content, fps, complaint in bad:
        with pytest.raises((OSError, ValueError)) as error:
            write_video(path, content, fps)
        assert str(error.value).startswith(f"{path}: ") and complaint in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the dance clip, which is not in this repository, is not here"
)
def test_real_footage_reads():
    frames, fps = read_frames(SHARED / "clips" / "dance.mp4", range(0, 36, 5))
    assert frames.shape == (8, 512, 288, 3) and fps == 24


CASES = SHARED / "cases"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="needs the small inputs that went wrong")


@pytest.mark.parametrize("extension", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("sounding", [False, True])
def test_a_video_that_is_cut_off_says_how_many_frames_are_missing(tmp_path, capfd, extension, sounding):
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    cut, sound = tmp_path / f"cut.{extension}", np.zeros(2 * RATE) if sounding else None
    if extension == "mp4":
        write_video(cut, noise, 12)
        if sounding:
            make_video(tmp_path / "sound.mkv", noise, np.arange(24) / 12, sound)
            add_sound(cut, tmp_path / "sound.mkv", 0, 2)
    else:
        make_video(cut, noise, np.arange(24) / 12, sound, claimed=12)
    assert len(open_clip(cut)) == 24 and not any(capfd.readouterr())
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    count = len(open_clip(cut))
    (line,), nothing = (text.splitlines() for text in capfd.readouterr())
    words = (
        f"cut.{extension}: cut off or damaged: {count} frames can be read, about {24 - count} frames are"
    )
    assert words in line and not nothing
    assert len(read_frames(cut)[0]) == count
    assert not any(capfd.readouterr()), "said twice"


@needs_cases
def test_cases_of_videos_cut_off(capfd):
    frames, _ = read_frames(CASES / "fcut50.mp4")
    said = capfd.readouterr()
    assert len(frames) == 3 and "3 frames can be read, about 9 frames are missing" in said.out
    assert not said.err
    for name in ("cut50.mp4", "audio_only.mp4"):
        for read in (read_frames, open_clip):
            with pytest.raises(OSError, match=rf"{name}: not a readable video"):
                read(CASES / name)
    assert not any(capfd.readouterr())


@needs_cases
@pytest.mark.parametrize(
    ("name", "shape"),
    [("rot", (256, 192)), ("odd", (191, 255)), ("tenbit", (192, 256)), ("vfr", (192, 256))],
)
def test_videos_as_cameras_write_them_are_read_upright_and_whole(name, shape, capfd):
    path = CASES / f"{name}.mp4"
    assert read_frames(path)[0].shape == (12, *shape, 3) and len(open_clip(path)) == 12
    said = capfd.readouterr()
    assert not said.err and ("not evenly spaced in time" in said.out) == (name == "vfr")


# --------------------------------------------------------------------------------------- images


def test_pictures_that_are_far_too_large_or_narrow_are_refused_at_once(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (2000, 4)).save(tmp_path / "narrow.png")
    write_video(tmp_path / "narrow.mp4", np.zeros((2, 400, 4, 3), np.uint8), 8)
    for name, size in (("narrow.png", "2000x4"), ("narrow.mp4", "4x400")):
        with pytest.raises(ValueError, match=rf"{name}: {size} pixels are too long and narrow"):
            read_frames(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # up to twice as many PIL only warns of
    with pytest.raises(OSError, match=r"narrow\.png: not a readable image"):
        read_frames(tmp_path / "narrow.png")
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]


@needs_cases
@pytest.mark.parametrize("name", ["bomb.png", "sl1.png"])
def test_cases_of_pictures_that_are_no_footage(name):
    with pytest.raises((OSError, ValueError), match=rf"{name}: [^\n]*$"):
        read_frames(CASES / name)


def test_a_folder_of_images_is_a_clip_in_the_order_of_its_numbers(tmp_path):
    for number in (1, 10, 9, 2):
        save_image(tmp_path / f"frame{number}.png", np.full((8, 6, 3), number, np.uint8))
    (tmp_path / "notes.txt").write_text("not a frame")
    frames, fps = read_frames(tmp_path)
    assert frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10] and frames.shape[1:] == (8, 6, 3)
    assert fps == 24
    assert read_frames(tmp_path, [3, 0])[0][:, 0, 0, 0].tolist() == [10, 1]
    with pytest.raises(ValueError, match="has 4 frames"):
        read_frames(tmp_path, [4])


def test_one_image_is_a_clip_of_one_frame(tmp_path):
    save_image(tmp_path / "still.png", np.full((8, 6, 3), 77, np.uint8))
    frames, _ = read_frames(tmp_path / "still.png")
    assert frames.shape == (1, 8, 6, 3) and (frames == 77).all()


@pytest.mark.parametrize(
    "name, pixels, rgb",
    [
        ("grey", np.full((4, 3), 90, np.uint8), (90, 90, 90)),
        ("grey 16 bit", np.full((4, 3), 90 * 257, np.uint16), (90, 90, 90)),
        ("grey alpha", np.full((4, 3, 2), (200, 128), np.uint8), (100, 100, 100)),
        ("opaque", np.full((4, 3, 4), (10, 20, 30, 255), np.uint8), (10, 20, 30)),
        ("half there", np.full((4, 3, 4), (200, 100, 50, 128), np.uint8), (100, 50, 25)),
        ("not there", np.full((4, 3, 4), (200, 100, 50, 0), np.uint8), (0, 0, 0)),
    ],
)
def test_every_kind_of_image_becomes_rgb_over_black(tmp_path, name, pixels, rgb):
    Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    frames, _ = read_frames(tmp_path / f"{name}.png")
    assert frames.shape == (1, 4, 3, 3) and frames.dtype == np.uint8
    assert np.abs(frames[0].astype(int) - rgb).max() <= 1


def test_a_phone_s_sideways_photo_is_set_upright(tmp_path):
    image = Image.fromarray(clip(1, height=40, width=60)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_frames(tmp_path / "photo.jpg")[0].shape == (1, 60, 40, 3)


def test_images_that_make_no_clip_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no images"):
        read_frames(tmp_path)
    save_image(tmp_path / "1.png", np.zeros((8, 6, 3), np.uint8))
    save_image(tmp_path / "2.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"2\.png: 8x6 pixels, but 1\.png has 6x8"):
        read_frames(tmp_path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "._1.png").write_bytes(b"what a Mac leaves on other disks")
    assert len(open_clip(tmp_path)) == len(read_frames(tmp_path)[0]) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(OSError, match=r"1\.png: not a readable image"):
        read_frames(tmp_path)
    monkeypatch.undo()
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    with pytest.raises(OSError, match=r"2\.png: not a readable image"):
        read_frames(tmp_path)


def test_an_image_of_unknown_extension_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"unknown file extension: \.xyz"):
        save_image(tmp_path / "sheet.xyz", np.zeros((8, 6, 3), np.uint8))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    "source, size, multiple, canvas",
    [
        ((512, 512), 512, 64, (512, 512)),
        ((1920, 1080), 512, 64, (896, 512)),  # portrait: 910 would keep the aspect
        ((1080, 1920), 512, 64, (512, 896)),
        ((1080, 1920), 512, 8, (512, 912)),
        ((101, 333), 128, 8, (128, 424)),
        ((50, 40), 130, 8, (160, 128)),  # enlarged; 130 is no multiple of 8
    ],
)
def test_the_canvas_is_the_multiple_nearest_to_the_frame_s_shape(source, size, multiple, canvas):
    plan = fit(*source, size, multiple)
    assert (plan.height, plan.width) == canvas
    assert fit_frame(np.zeros((*source, 3), np.uint8), plan).shape == (*canvas, 3)


@pytest.mark.parametrize("source", [(1920, 1080), (1080, 1920), (333, 101), (97, 512), (64, 64)])
def test_the_frame_covers_the_canvas_without_bars(source):
    white = np.full((*source, 3), 255, np.uint8)
    assert (fit_frame(white, fit(*source, 128, 64)) == 255).all()


@pytest.mark.parametrize("source", [(1920, 1080), (480, 854), (333, 257), (700, 401), (90, 160)])
@pytest.mark.parametrize("point", [(0.5, 0.5), (0.31, 0.62), (0.8, 0.2)])
def test_the_pose_follows_the_frame(source, point):
    """A bright dot at a keypoint of the source lies at that keypoint of the canvas."""
    height, width = source
    x, y = point[0] * width, point[1] * height
    rows, columns = np.mgrid[:height, :width] + 0.5  # pixel centres
    blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (min(source) / 40) ** 2))
    frame = np.repeat((255 * blob[..., None]).astype(np.uint8), 3, axis=2)

    plan = fit(height, width, 128, 64)
    seen = fit_frame(frame, plan)[..., 0].astype(float)
    rows, columns = np.mgrid[: plan.height, : plan.width] + 0.5
    found = (columns * seen).sum() / seen.sum(), (rows * seen).sum() / seen.sum()

    body = np.zeros((18, 3), np.float32)
    body[0] = (*point, 1)
    placed = place_pose(Pose(body=body), *plan.placement).body[0, :2] * (plan.width, plan.height)
    np.testing.assert_allclose(found, placed, atol=0.25)


def test_a_circle_stays_round():
    rows, columns = np.mgrid[:300, :520]
    disc = ((rows - 150) ** 2 + (columns - 260) ** 2 < 100**2)[..., None].repeat(3, axis=2)
    fitted = fit_frame(np.uint8(255) * disc, fit(300, 520, 128, 64))[..., 0] > 127
    tall, wide = fitted.any(axis=1).sum(), fitted.any(axis=0).sum()
    assert abs(int(tall) - int(wide)) <= 1


def test_a_fit_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="size of 32 pixels is too small: the least is 64"):
        fit(512, 512, 32, 64)


# --------------------------------------------------------------------------------------- sheets


def test_a_contact_sheet_shows_evenly_spaced_frames_of_every_row():
    red = [np.full((10, 10, 3), (10 * index, 0, 0), np.uint8) for index in range(21)]
    green = [np.full((10, 20, 3), (0, 250, 0), np.uint8)] * 2
    sheet = np.asarray(contact_sheet({"red": red, "green": green}, columns=3, height=40))
    assert sheet.shape[0] > 2 * 40 and sheet.shape[1] > 3 * 80  # as wide as the widest row's cells

    def size_of(colour):
        found = (sheet == colour).all(axis=2)
        return tuple(int(found.any(axis=axis).sum()) for axis in (1, 0))

    assert size_of((0, 250, 0)) == (40, 160)  # two cells of 40x80
    for index in (0, 10, 20):
        assert size_of((10 * index, 0, 0)) == (40, 40)
    assert size_of((50, 0, 0)) == (0, 0)
    assert (sheet[..., 2] > 150).any()  # the letters: no frame here has any blue


def test_a_row_without_frames_is_named():
    with pytest.raises(ValueError, match='"ours" has no frames'):
        contact_sheet({"ours": []})


def test_a_sheet_is_saved_whole(tmp_path):
    sheet = contact_sheet({"clip": clip(4)}, height=48)
    save_image(tmp_path / "sheet.png", sheet)
    assert np.array_equal(read_frames(tmp_path / "sheet.png")[0][0], np.asarray(sheet))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><title>404</title>", "a web page: download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"", "the file is empty"),
        (b"notes on a dance\n" * 200, "a readable video, or one without pictures"),
        (b"#EXTM3U\n#EXTINF:1,\nother.ts\n", "a readable video, or one without pictures"),
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.txt"])
def test_what_is_no_footage_is_called_by_its_name(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=rf"{name}: not .*{words}"):
        len(open_clip(tmp_path / name))
