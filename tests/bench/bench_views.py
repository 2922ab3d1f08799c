"""What two views of an image cost beside other libraries that augment MRI: images per second, side by side in one run.

    python tests/bench/bench_views.py                                   # this machine: the GPU if there is one
    python tests/bench/bench_views.py --dimensions 2 --size 128 --batch 32 --json rows.json --picture views.png

Everybody makes two views of each image with the ranges of p2r's defaults. These are rotation, scale, shear, shift, flips and elastic
deformation for one of them; gamma, contrast, bias field, blur and noise for both. What a library lacks stands in the last
column, and is left out. TorchIO works on one sample on the CPU, MONAI on one sample on the device; kornia and p2r on
batches on the device. Only p2r returns where each pixel comes from and which pixels to trust.

Contenders take turns, so that a slow minute of the machine falls on all of them; times are medians over the rounds, and
ratios are medians of the rounds' ratios. Peers that are not installed are named: `pip install -e '.[bench]'` brings them.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from p2r.config import IntensityConfig, ViewsConfig
from p2r.views import make_views

Views = Callable[[Tensor], tuple[Tensor, Tensor]]
OURS = "p2r"
SPACING_MM = 1.5
RANGES = ViewsConfig()


@dataclass(frozen=True)
class Setting:
    """What is augmented."""

    dimensions: int
    size: int
    batch: int
    device: torch.device

    def images(self) -> Tensor:
        """Smooth blobs in [0, 1], (B, 1, *S), on the device."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(self.batch, 1, *[8] * self.dimensions, generator=generator)
        mode = "bilinear" if self.dimensions == 2 else "trilinear"
        return torch.nn.functional.interpolate(coarse, size=[self.size] * self.dimensions, mode=mode).to(self.device)


def contenders(setting: Setting) -> Iterator[tuple[str, Views | str, str]]:
    """Yield names, functions that make two views (or why one is not measured), and what they lack."""
    for name, (make, lacks) in CONTENDERS.items():
        try:
            yield name, make(setting), lacks(setting.dimensions)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}".splitlines()[0], ""


def ours(setting: Setting) -> Views:
    inside = torch.ones(setting.batch, *[setting.size] * setting.dimensions, dtype=torch.bool, device=setting.device)
    epoch = 0

    def views(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal epoch
        epoch += 1
        pair = make_views(
            images,
            inside,
            config=RANGES,
            spacing_mm=SPACING_MM,
            seed=0,
            epochs=np.full(setting.batch, epoch),
            positions=np.arange(setting.batch),
        )
        return pair.a, pair.b

    return views


def torchio(setting: Setting) -> Views:
    import torchio as tio

    geometry = RANGES.geometry
    plane = setting.dimensions == 2
    degrees = (0, 0, geometry.rotation_deg) if plane else geometry.rotation_3d_deg
    translation = (geometry.translation_mm, geometry.translation_mm, 0 if plane else geometry.translation_mm)
    axes = (0, 1) if plane else (0, 1, 2)
    # Its grid has at least 4 control points along an axis, and none may move across a plane.
    edge_mm = setting.size * SPACING_MM
    controls = max(math.ceil(edge_mm / geometry.elastic_spacing_mm) + 3, 4)
    move = tio.Compose(
        [
            tio.RandomAffine(scales=geometry.scale, isotropic=True, degrees=degrees, translation=translation),
            tio.RandomElasticDeformation(
                num_control_points=(controls, controls, 4 if plane else controls),
                max_displacement=(geometry.elastic_mm, geometry.elastic_mm, 0 if plane else geometry.elastic_mm),
                locked_borders=0,
            ),
            tio.RandomFlip(axes=axes, flip_probability=geometry.flip_probability),
        ]
    )
    appear = torchio_appearance(RANGES.intensity)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])

    def views(images: Tensor) -> tuple[Tensor, Tensor]:
        firsts, seconds = [], []
        for image in images.cpu():
            volume = image[..., None] if plane else image
            scan = tio.ScalarImage(tensor=volume, affine=affine)
            firsts.append(appear(scan).data)
            seconds.append(appear(move(scan)).data)
        a, b = (torch.stack(part).reshape(images.shape).to(images.device) for part in (firsts, seconds))
        return a, b

    return views


def torchio_appearance(look: IntensityConfig) -> Callable[[Any], Any]:
    """Compose what TorchIO has of the intensity transforms, with our ranges and probabilities."""
    import torchio as tio

    gamma = tuple(math.log(value) for value in look.gamma)
    return tio.Compose(
        [
            tio.RandomGamma(log_gamma=gamma, p=look.gamma_probability),
            tio.RandomBiasField(coefficients=look.bias_field, p=look.bias_field_probability),
            tio.RandomBlur(std=(0, look.blur_mm), p=look.blur_probability),
            tio.RandomNoise(std=(0, look.noise), p=look.noise_probability),
            tio.Lambda(lambda values: 1 - values, p=look.inversion_probability),
        ]
    )


def monai(setting: Setting) -> Views:
    from monai import transforms as mt

    geometry, look = RANGES.geometry, RANGES.intensity
    dimensions = setting.dimensions
    radians = (
        np.deg2rad(geometry.rotation_deg) if dimensions == 2 else tuple(np.deg2rad(geometry.rotation_3d_deg).tolist())
    )
    shear = (math.tan(math.radians(geometry.shear_deg)),) * (2 if dimensions == 2 else 6)
    parts: dict[str, Any] = {
        "prob": 1.0,
        "rotate_range": radians,
        "shear_range": shear,
        "translate_range": (geometry.translation_mm / SPACING_MM,) * dimensions,
        "scale_range": ((geometry.scale[0] - 1, geometry.scale[1] - 1),) * dimensions,
        "padding_mode": "zeros",
        "device": setting.device,
    }
    pixels = geometry.elastic_spacing_mm / SPACING_MM
    amplitude = geometry.elastic_mm / SPACING_MM
    if dimensions == 2:
        elastic = mt.Rand2DElastic(spacing=(pixels, pixels), magnitude_range=(0, amplitude), **parts)
    else:  # a smoothed field of one displacement per voxel, and no control points
        elastic = mt.Rand3DElastic(sigma_range=(pixels / 3, pixels / 3), magnitude_range=(0, 50 * amplitude), **parts)
    flips = [mt.RandFlip(prob=geometry.flip_probability, spatial_axis=axis) for axis in range(dimensions)]
    move = mt.Compose([elastic, *flips])
    names = ("sigma_x", "sigma_y", "sigma_z")[:dimensions]
    sigmas = dict.fromkeys(names, (0.0, look.blur_mm / SPACING_MM))
    appear = mt.Compose(
        [
            mt.RandAdjustContrast(prob=1.0, gamma=look.gamma),
            mt.RandBiasField(prob=1.0, coeff_range=(0.0, look.bias_field)),
            mt.RandGaussianSmooth(prob=look.blur_probability, **sigmas),
            mt.RandGaussianNoise(prob=1.0, std=look.noise),
        ]
    )

    def views(images: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [(appear(image), appear(move(image))) for image in images]
        a, b = (torch.stack([torch.as_tensor(view) for view in part]) for part in zip(*pairs, strict=True))
        return a, b

    return views


def kornia(setting: Setting) -> Views:
    from kornia import augmentation as ka

    geometry, look = RANGES.geometry, RANGES.intensity
    share = geometry.translation_mm / SPACING_MM / setting.size
    flip = geometry.flip_probability
    if setting.dimensions == 3:
        move = torch.nn.Sequential(
            ka.RandomAffine3D(geometry.rotation_3d_deg, translate=(share,) * 3, scale=geometry.scale, p=1.0),
            ka.RandomHorizontalFlip3D(p=flip),
            ka.RandomVerticalFlip3D(p=flip),
            ka.RandomDepthicalFlip3D(p=flip),
        )
        return lambda images: (images, move(images))
    shear = geometry.shear_deg
    move = torch.nn.Sequential(
        ka.RandomAffine(geometry.rotation_deg, translate=(share, share), scale=geometry.scale, shear=shear, p=1.0),
        ka.RandomElasticTransform(kernel_size=(63, 63), sigma=(16.0, 16.0), p=1.0),
        ka.RandomHorizontalFlip(p=flip),
        ka.RandomVerticalFlip(p=flip),
    )
    sigma = look.blur_mm / SPACING_MM
    appear = torch.nn.Sequential(
        ka.RandomGamma(look.gamma, p=1.0),
        ka.RandomContrast(look.contrast, p=1.0),
        ka.RandomGaussianBlur((7, 7), (0.01, sigma), p=look.blur_probability),
        ka.RandomGaussianNoise(std=look.noise, p=1.0),
        ka.RandomInvert(p=look.inversion_probability),
    )
    return lambda images: (appear(images), appear(move(images)))


CONTENDERS: dict[str, tuple[Callable[[Setting], Views], Callable[[int], str]]] = {
    OURS: (ours, lambda dimensions: ""),
    "TorchIO": (torchio, lambda dimensions: "shear, contrast"),
    "MONAI": (monai, lambda dimensions: "contrast about the mean, inversion"),
    "kornia": (kornia, lambda dimensions: "bias field" if dimensions == 2 else "elastic, everything but geometry"),
}


def timed(views: Views, images: Tensor) -> float:
    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    views(images)
    return now() - began


def measure(setting: Setting, rounds: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Measure every contender in one setting."""
    images = setting.images()
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[Views, dict[str, Any]]] = {}
    for name, views, lacks in contenders(setting):
        if only is not None and name not in (OURS, *only):
            continue
        row: dict[str, Any] = {"contender": name, "dimensions": setting.dimensions, "size": setting.size}
        row |= {"batch": setting.batch, "threads": torch.get_num_threads(), "lacks": lacks}
        rows.append(row)
        if isinstance(views, str):
            row["skipped"] = views
            continue
        try:
            made = views(images)  # warms up
        except Exception as reason:
            row["skipped"] = f"{type(reason).__name__}: {reason}".splitlines()[0][:120]
            continue
        assert all(view.shape == images.shape and view.device == images.device for view in made), name
        running[name] = (views, row)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, (views, _) in running.items():
            seconds[name].append(timed(views, images))
            progress(f"{setting.dimensions}D, round {turn + 1} of {rounds}, {name}: {seconds[name][-1]:.3f} s")
    for name, (_, row) in running.items():
        row["seconds"] = statistics.median(seconds[name])
        row["images_per_s"] = setting.batch / row["seconds"]
        ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[OURS], strict=True)]
        row["times_ours"] = statistics.median(ratios)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("contender", "image", "batch", "ms an image", "images/s", "x ours", "lacks")
    for row in rows:
        head = [row["contender"], " x ".join([str(row["size"])] * row["dimensions"]), str(row["batch"])]
        if "skipped" in row:
            result.add_row(*head, "", "", "", f"[dim]{row['skipped']}[/dim]")
            continue
        per_image = 1e3 * row["seconds"] / row["batch"]
        result.add_row(
            *head, f"{per_image:.2f}", f"{row['images_per_s']:.0f}", f"{row['times_ours']:.1f}", row["lacks"]
        )
    return result


def picture(rows: list[dict[str, Any]], device: str, file: Path) -> None:
    """Images per second as bars, one panel for each kind of image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({(row["dimensions"], row["size"], row["batch"]) for row in rows})
    figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.2), layout="constrained", squeeze=False)
    for axes, (dimensions, size, batch) in zip(panels[0], kinds, strict=True):
        shown = [row for row in rows if row["dimensions"] == dimensions and "skipped" not in row][::-1]
        rates = [row["images_per_s"] for row in shown]
        colours = ["#0072b2" if row["contender"] == OURS else "#9a9a9a" for row in shown]
        bars = axes.barh([row["contender"] for row in shown], rates, color=colours)
        axes.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=4)
        axes.set(
            xscale="log", xlabel="images per second", title=f"{' x '.join([str(size)] * dimensions)}, batch {batch}"
        )
        axes.set_xlim(min(rates) / 2, max(rates) * 4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Two views of each image, {device}", x=0.01, ha="left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", choices=[2, 3], default=[2, 3])
    parser.add_argument("--size", type=int, help="edge of the images; default: 128 in 2D, 96 in 3D")
    parser.add_argument("--batch", type=int, help="images at once; default: 32 in 2D, 2 in 3D")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders to measure; ours always is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for dimensions in options.dimensions:
        size, batch = options.size or (128, 96)[dimensions - 2], options.batch or (32, 2)[dimensions - 2]
        rows += measure(Setting(dimensions, size, batch, device), options.rounds, options.only)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console = Console(width=150)
    console.print(table(rows))
    console.print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps({"device": name, "rows": rows}, indent=1))
    if options.picture:
        picture(rows, name, options.picture)


if __name__ == "__main__":
    main()
