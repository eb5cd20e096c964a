"""Records what the public implementations of LPIPS, FID and FVD make of made-up weights and frames.

    python tests/record_metrics.py

writes `metrics.safetensors` beside this file, which `test_features.py` compares ours with. They need
torchvision, whose operators are compiled for CUDA's torch and keep transformers from being imported
beside any other, so they live in an environment of their own: that of requirements-dev.txt, then
`pip install --no-deps torchvision==0.28.0 lpips==0.1.4 pytorch-fid==0.3.0 cd-fvd==0.1.1`.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from weights import fill

RECORD = Path(__file__).with_name("metrics.safetensors")


def made_up_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights under which signals stay about as large through all layers of a network of ReLUs."""
    shapes = {n: shape for n, shape in shapes.items() if not n.endswith("num_batches_tracked")}
    weights = fill(shapes, gain=2**0.5)
    for name, values in weights.items():
        if name.endswith("running_var"):
            values.add_(1)
        if name.startswith("lin"):  # LPIPS's weights of channels, which are not negative
            values.abs_()
    return weights


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def made_up_frames(seed: int, count: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Frames uint8 (count, height, width, 3) of coarse blocks that change, under fine noise."""
    random = np.random.RandomState(seed)
    blocks = random.randint(0, 200, (count, height // 10, width // 10, 3))
    coarse = blocks.repeat(10, axis=1).repeat(10, axis=2)
    return (coarse + random.randint(0, 56, coarse.shape)).astype(np.uint8)


def record_lpips() -> dict[str, torch.Tensor]:
    import lpips

    network = lpips.LPIPS(net="alex", version="0.1", pretrained=False, pnet_rand=True)
    places = {"slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10"}
    names = {f"net.{place}": f"features.{place.split('.')[1]}" for place in places}
    public = {}
    for name in network.state_dict():
        prefix, _, kind = name.rpartition(".")
        public[name] = f"{names[prefix]}.{kind}" if prefix in names else name
    shapes = {public[name]: shape for name, shape in shapes_of(network).items()}
    weights = made_up_weights({n: s for n, s in shapes.items() if n.startswith(("features", "lin"))})
    state = network.state_dict()  # its scaling layer and the second names of its lins included
    for name in state:
        stored = public[name]
        if stored.startswith("lins."):
            stored = f"lin{stored.removeprefix('lins.')}"
        if stored in weights:
            state[name] = weights[stored]
    network.load_state_dict(state)
    a, b = (torch.from_numpy(made_up_frames(seed, 3)).permute(0, 3, 1, 2) / 127.5 - 1 for seed in (1, 2))
    return {"lpips": network(a, b).flatten()}


def record_fid() -> dict[str, torch.Tensor]:
    from pytorch_fid import fid_score, inception

    def made_up(*_, **__):
        network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        network.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
        network.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
        network.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
        return network.state_dict() | made_up_weights(shapes_of(network))

    inception.load_state_dict_from_url = made_up
    network = inception.InceptionV3().eval()
    features = {}
    for name, seed in (("a", 3), ("b", 4)):
        images = torch.from_numpy(made_up_frames(seed, 4)).permute(0, 3, 1, 2) / 255
        features[f"inception_{name}"] = network(images)[0][:, :, 0, 0]
    statistics = []
    for values in features.values():
        values = values.double().numpy()
        statistics += [values.mean(axis=0), np.cov(values, rowvar=False)]
    distance = fid_score.calculate_frechet_distance(*statistics)
    return features | {"fid": torch.tensor(distance)}


def record_fvd() -> dict[str, torch.Tensor]:
    import scipy
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    network = InceptionI3d(400, in_channels=3).eval()
    network.load_state_dict(made_up_weights(shapes_of(network)), strict=False)
    features = {}
    for name, seed in (("a", 5), ("b", 6)):
        frames = made_up_frames(seed, 20)
        clips = np.stack([frames[start : start + 16] for start in (0, 4)])
        features[f"i3d_{name}"] = network(preprocess_i3d(clips))
    a, b = (values.double().numpy() for values in features.values())
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    spread = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real)
    distance = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + spread
    return features | {"fvd": torch.tensor(distance)}


if __name__ == "__main__":
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # unused here, but torchvision wants them declared
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with torch.no_grad():
        record = record_lpips() | record_fid() | record_fvd()
    for name, values in record.items():
        print(name, tuple(values.shape), values.flatten()[:3].tolist())
    save_file({name: values.contiguous() for name, values in record.items()}, RECORD)
