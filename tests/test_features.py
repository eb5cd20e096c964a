"""The metrics' networks, held against what the public implementations gave for the same weights.

`record_metrics.py` recorded that, preprocessing included: lpips 0.1.4, pytorch-fid 0.3.0, cd-fvd 0.1.1.
"""

import io
import re

import numpy as np
import pytest
import torch
from record_metrics import RECORD, made_up_frames, made_up_weights, shapes_of
from safetensors.torch import load_file, save_file

from metrics import networks as features
from metrics.clip_images import ImageEncoder
from metrics.figures import frame_lpips, frechet_distance, i3d_features, inception_features
from metrics.networks import FILES, I3D, LPIPS, PARTS, Inception, find_weights, load_network
from public.hub import PublicFile


@pytest.fixture(scope="module")
def record() -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in load_file(RECORD).items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with made-up weights of LPIPS, Inception and I3D, in files like the public ones."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in (LPIPS, Inception, I3D):
        with torch.device("meta"):
            network = kind()
        for part, within in PARTS[kind].items():
            tensors = made_up_weights(shapes_of(network.get_submodule(within)))
            # What the public files carry beside these, which nothing here has a use for.
            tensors["fc.weight" if part == "inception" else "classifier.1.weight"] = torch.ones(2, 2)
            tensors["some.bn.num_batches_tracked"] = torch.tensor(0)
            torch.save(tensors, folder / FILES[part].path)
    return folder


def differs_by(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_lpips_is_that_of_the_public_implementation(record, weights):
    network = load_network(LPIPS, weights)
    ours = frame_lpips(network, made_up_frames(1, 3), made_up_frames(2, 3))
    assert ours == pytest.approx(record["lpips"], rel=1e-4)
    assert frame_lpips(network, made_up_frames(1, 1), made_up_frames(1, 1)) == 0


def test_fid_and_its_features_are_those_of_the_public_implementation(record, weights):
    network = load_network(Inception, weights)
    ours = [inception_features(network, made_up_frames(seed, 4)) for seed in (3, 4)]
    assert differs_by(ours[0], record["inception_a"]) < 1e-4
    assert differs_by(ours[1], record["inception_b"]) < 1e-4
    assert frechet_distance(*ours) == pytest.approx(record["fid"], rel=1e-4)


def test_fvd_and_its_features_are_those_of_the_public_implementation(record, weights):
    network = load_network(I3D, weights)
    ours = [i3d_features(network, made_up_frames(seed, 20)) for seed in (5, 6)]
    assert differs_by(ours[0], record["i3d_a"]) < 1e-4
    assert differs_by(ours[1], record["i3d_b"]) < 1e-4
    assert frechet_distance(*ours) == pytest.approx(record["fvd"], rel=1e-4)


def test_the_distance_is_that_by_the_root_of_the_covariances():
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.RandomState(0)
    a, b = random.randn(90, 24), 0.3 + random.randn(70, 24) @ random.randn(24, 24)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = a.mean(axis=0) - b.mean(axis=0)
    theirs = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)


def test_the_distance_to_itself_is_zero_and_to_a_moved_copy_the_square_of_the_way():
    a = np.random.RandomState(0).randn(5, 200)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(200 * 0.5**2)


def test_one_feature_has_no_distribution():
    with pytest.raises(ValueError, match="2 features"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


def test_a_clip_that_is_too_short_for_i3d_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="9 frames"):
        I3D()(torch.zeros(1, 8, 3, 32, 32))


# ---- Files --------------------------------------------------------------------------------------


def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(weights, tmp_path):
    path = tmp_path / FILES["lpips"].path
    tensors = torch.load(weights / path.name, weights_only=True)
    save_file({n: t for n, t in tensors.items() if not n.startswith("lin3")}, path)
    (tmp_path / FILES["alexnet"].path).symlink_to(weights / FILES["alexnet"].path)
    with pytest.raises(ValueError, match=re.escape("lin3.model.1.weight")):
        load_network(LPIPS, tmp_path)
    save_file(tensors | {"lin5.model.1.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=re.escape("lin5.model.1.weight")):
        load_network(LPIPS, tmp_path)
    save_file(tensors | {"lin0.model.1.weight": torch.ones(1, 63, 1, 1)}, path)
    with pytest.raises(ValueError, match="1x63x1x1, expected 1x64x1x1"):
        load_network(LPIPS, tmp_path)


@pytest.mark.filterwarnings("ignore")  # torch's, on its own format
def test_a_file_that_is_a_program_is_not_run(tmp_path):
    path = tmp_path / FILES["i3d"].path
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_network(I3D, tmp_path)


class Answer(io.BytesIO):
    """What urlopen gives."""

    headers = {"Content-Length": "5"}  # noqa: RUF012


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web that answers every request with the bytes put in here, and torch.hub's empty folder."""
    answers = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "urlopen", lambda url, timeout: Answer(answers.pop()))
    return answers


def test_a_file_is_downloaded_once(web, tmp_path):
    web.append(b"12345")
    path = find_weights("i3d", None)
    assert path == tmp_path / "checkpoints" / "i3d_pretrained_400.pt"
    assert path.read_bytes() == b"12345"
    assert find_weights("i3d", tmp_path) == path


@pytest.mark.parametrize("part, content", [("i3d", b"123"), ("alexnet", b"12345")])
def test_what_is_cut_off_or_altered_on_the_way_is_not_kept(web, tmp_path, part, content):
    web.append(content)
    with pytest.raises(OSError, match="not the published file") as refused:
        find_weights(part, None)
    assert "--weights" in str(refused.value)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_no_connection_is_said_in_one_line_for_every_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "urlopen", refuse)
    monkeypatch.setattr(features, "hf_hub_download", refuse)
    monkeypatch.setattr(PublicFile, "cached", lambda _: None)
    for part, file in FILES.items():
        with pytest.raises(OSError) as refused:
            find_weights(part, None)
        line = str(refused.value)
        assert file.path in line and "service not known" in line and "\n" not in line


def test_full_sizes_have_the_public_networks_numbers_of_parameters():
    with torch.device("meta"):
        sizes = {kind: shapes_of(kind()) for kind in PARTS}
    count = {k: sum(int(np.prod(shape)) for shape in sizes[k].values()) for k in sizes}
    assert count[LPIPS] == 2_469_696 + 1152
    assert count[ImageEncoder] == 303_966_208
