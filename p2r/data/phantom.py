"""The ICBM-152 template of nilearn -> virtual subjects: T1-like brains with exact labels, without a download.

Every subject is the template with a random deformation (affine and smooth elastic), tissue contrast, bias field and noise.
Labels undergo the same deformation, so they are exact by construction. There are two kinds: tissues, which brightness nearly
gives, and regions of the brain, which look alike and differ in place. Virtual subjects allow the whole system to be tried
and its results checked where no data set may be shipped. Results on them do not predict results on people.

Everything is a function of (seed, subject number): subject 7 is the same in a group of 8 and of 800.
"""

import hashlib
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from p2r.data.volume import write_nifti
from p2r.errors import DataError
from p2r.randomness import keyed_generator
from p2r.storage import cache_folder

CLASSES = {1: "GM", 2: "WM"}
"""Classes of the folder `labels`."""
REGIONS = {1: "frontal", 2: "parietal", 3: "occipital", 4: "temporal", 5: "hindbrain"}
"""Classes of the folder `regions`: grey and white matter together, cut by planes in MNI coordinates; hindbrain is the cerebellum and
the brain stem. The two sides have the same classes, so mirrored images keep their labels."""

_RECIPE = "2"  # increment with every change that affects the files; images and labels have the bytes of recipe 1
_SPACING_MM = 2
_MARGIN = 5  # voxels around the brain, for the deformation
_MAX_SUBJECTS = 10_000
_MARKER = "complete.json"
# Each region, and half-spaces a |x| + b y + c z <= d, mm, whose intersection it fills. A position belongs to the first region that
# contains it. The planes follow the tentorium, the lateral fissure, the parieto-occipital and the central sulcus only roughly.
_CEREBELLUM = ((0.28, 0.0, 1.0, -7.0), (0.28, -0.45, 1.0, 14.0), (0.0, 1.0, 0.0, -36.0))
_BRAIN_STEM = ((1.0, 0.0, 0.0, 18.0), (0.0, 1.0, 0.0, -10.0), (0.0, 0.0, 1.0, -10.0))
_TEMPORAL = ((-1.0, 0.0, 0.0, -22.0), (0.0, 0.25, 1.0, 2.0), (0.0, 1.0, 0.0, 20.0), (0.0, -1.0, 0.0, 60.0))
_TEMPORAL_POLE = ((-1.0, 0.0, 0.0, -14.0), (0.0, 0.0, 1.0, -22.0), (0.0, 1.0, 0.0, 24.0), (0.0, -1.0, 0.0, 60.0))
_OCCIPITAL = ((0.0, 1.0, 0.35, -62.0),)
_FRONTAL = ((0.55, -1.0, 0.0, 35.0),)
_CUTS = (
    (5, _CEREBELLUM),
    (5, _BRAIN_STEM),
    (4, _TEMPORAL),
    (4, _TEMPORAL_POLE),
    (3, _OCCIPITAL),
    (1, _FRONTAL),
    (2, ()),
)
_TISSUE = (0.0, 0.30, 0.65, 0.87, 1.0)  # template intensities: air, fluid, grey matter, white matter, brightest

_FOLDERS = ("images", "labels", "regions")

_README = """Virtual subjects, made by p2r: not scans of people.

Each file in images/ is the ICBM-152 (2009a, nonlinear, symmetric) T1 template at 2 mm with a random deformation,
contrast, bias field and noise (seed {seed}, {num_subjects} subjects). labels/ holds the template's tissue maps after
the same deformation: 0 background and fluid, 1 grey matter (GM), 2 white matter (WM). regions/ holds grey and white
matter together, cut by planes in MNI coordinates before the deformation: 1 frontal, 2 parietal, 3 occipital,
4 temporal, 5 hindbrain (cerebellum and brain stem). The planes follow the sulci only roughly. Use them to try out a
system; results on them do not predict results on real scans.

"""

_LICENCE = """The template is distributed under this licence:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.

Source: VS Fonov, AC Evans, RC McKinstry, CR Almli, DL Collins. Unbiased nonlinear average age-appropriate brain
templates from birth to adulthood. NeuroImage 47, S102 (2009).
"""

Map = NDArray[np.float32]


def resolve_source(url: str, cache: Path | None = None) -> Path:
    """Return the folder of `template://icbm152[/images|/labels|/regions]?subjects=N&seed=S`, generating it if it does not exist.

    Args:
        url: The URL; subjects defaults to 24, seed to 0.
        cache: Parent folder; None: `$P2R_CACHE`, else `~/.cache/p2r`.

    Raises:
        DataError: for another template, folder or parameter.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    usage = "write template://icbm152/images?subjects=24&seed=0"
    if parts.scheme != "template" or parts.netloc != "icbm152":
        raise DataError(f"{url}: the only template is icbm152; {usage}")
    if parts.path.strip("/") not in ("", *_FOLDERS):
        raise DataError(f"{url}: a template has the folders {', '.join(_FOLDERS)}, not {parts.path!r}; {usage}")
    if unknown := sorted(query.keys() - {"subjects", "seed"}):
        raise DataError(f"{url}: unknown parameter {unknown[0]!r}; {usage}")
    subjects, seed = query.get("subjects", "24"), query.get("seed", "0")
    if not (subjects.isdecimal() and seed.isdecimal() and 1 <= int(subjects) <= _MAX_SUBJECTS):
        raise DataError(f"{url}: subjects must be 1 to {_MAX_SUBJECTS} and seed a whole number; {usage}")
    folder = (cache or cache_folder()) / "templates"
    return virtual_subjects(folder, num_subjects=int(subjects), seed=int(seed)) / parts.path.strip("/")


def virtual_subjects(folder: Path, *, num_subjects: int, seed: int) -> Path:
    """Write `sub-001_T1w.nii.gz`, ... into `images`, `labels` and `regions` of a folder below `folder`, and return it.

    An existing complete folder is reused. The folder gets its final name only when it is complete.
    """
    recipe = {
        "template": "icbm152-2009a",
        "recipe": _RECIPE,
        "nilearn": version("nilearn"),
        "num_subjects": num_subjects,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / f"icbm152-{num_subjects}-{seed}-{digest}"
    if (target / _MARKER).is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
    try:
        for name in _FOLDERS:
            (work / name).mkdir()
        template = _Template()
        for number in range(1, num_subjects + 1):
            volumes: tuple[NDArray[Any], ...] = template.subject(keyed_generator(seed, "phantom", number))
            for name, volume in zip(_FOLDERS, volumes, strict=True):
                write_nifti(work / name / f"sub-{number:03d}_T1w.nii.gz", volume, template.affine)
        (work / "README").write_text(_README.format(seed=seed, num_subjects=num_subjects) + _LICENCE)
        (work / "LICENSE").write_text(_LICENCE)
        (work / _MARKER).write_text(json.dumps(recipe, indent=2, sort_keys=True) + "\n")
        work.chmod(0o755)
        _move_into_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _move_into_place(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        if not (target / _MARKER).is_file():  # otherwise another process has made the same folder
            raise


class _Template:
    """T1, grey matter and white matter maps, cropped to the brain."""

    def __init__(self) -> None:
        # Imported here because nilearn takes a second to import, and only this class needs it.
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

        t1 = load_mni152_template(resolution=_SPACING_MM)
        maps = [np.asarray(t1.dataobj, np.float32)]
        maps += [
            np.asarray(load(resolution=_SPACING_MM).dataobj, np.float32)
            for load in (load_mni152_gm_template, load_mni152_wm_template)
        ]
        brain = np.argwhere(maps[0] > 0.05)
        first, last = brain.min(axis=0) - _MARGIN, brain.max(axis=0) + _MARGIN + 1
        pad = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(first, last, maps[0].shape, strict=True)]
        start = first + [before for before, _ in pad]
        box = tuple(slice(a, a + length) for a, length in zip(start, last - first, strict=True))
        self._t1, self._grey, self._white = (np.pad(one, pad)[box] for one in maps)
        self._t1_splines = ndimage.spline_filter(self._t1, order=3, output=np.float32)
        self.affine = np.array(t1.affine, dtype=np.float64)
        self.affine[:3, 3] += self.affine[:3, :3] @ first

    def subject(self, generator: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw one subject: (X, Y, Z) image, tissues and regions."""
        where = self._draw_deformation(generator)
        t1 = np.clip(ndimage.map_coordinates(self._t1_splines, where, order=3, prefilter=False), 0.0, 1.0)
        grey, white = (ndimage.map_coordinates(one, where, order=1) for one in (self._grey, self._white))
        label = np.argmax(np.stack([1.0 - grey - white, grey, white]), axis=0).astype(np.uint8)
        image = _simulate_scanner(_change_contrast(t1, generator), generator)
        return image, label, np.where(label > 0, self._find_regions(where), np.uint8(0))

    def _find_regions(self, where: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the region (X, Y, Z) of positions in the template (3, X, Y, Z), in voxels."""
        x, y, z = np.einsum("ij,jxyz->ixyz", self.affine[:3, :3], where) + self.affine[:3, 3, None, None, None]
        regions = np.zeros(x.shape, np.uint8)
        for region, half_spaces in _CUTS:
            is_inside = regions == 0
            for a, b, c, d in half_spaces:
                is_inside &= a * np.abs(x) + b * y + c * z <= d
            regions[is_inside] = region
        return regions

    def _draw_deformation(self, generator: np.random.Generator) -> NDArray[Any]:
        """Draw a deformation, (3, X, Y, Z): for each voxel of the subject, its position in the template, in voxels."""
        shape = self._t1.shape
        centre = (np.array(shape) - 1) / 2
        angles = np.deg2rad(generator.normal(0.0, 4.0, 3))
        zoom = np.exp(generator.normal(0.0, 0.05, 3))
        shear = np.eye(3) + np.triu(generator.normal(0.0, 0.03, (3, 3)), 1)
        matrix = _rotation_matrix(angles) @ shear @ np.diag(zoom)
        shift = generator.normal(0.0, 2.0, 3) / _SPACING_MM
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")) - centre[:, None, None, None]
        where = np.einsum("ij,jxyz->ixyz", matrix, grid) + (centre + shift)[:, None, None, None]
        for distance_mm, amplitude_mm in ((40.0, 4.0), (16.0, 1.2)):
            coarse = [max(4, round(n * _SPACING_MM / distance_mm) + 3) for n in shape]
            for axis in range(3):
                where[axis] += _draw_smooth_field(generator, coarse, shape) * amplitude_mm / _SPACING_MM
        return np.asarray(where)


def _rotation_matrix(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _draw_smooth_field(generator: np.random.Generator, coarse: list[int], shape: tuple[int, ...]) -> NDArray[Any]:
    """Draw standard normal control points, interpolated to `shape` by cubic splines."""
    field = generator.standard_normal(coarse)
    for axis, size in enumerate(shape):
        # The spline is separable: a small matrix per axis is ten times faster than a 3D zoom.
        basis = np.stack([ndimage.zoom(unit, size / len(unit), order=3) for unit in np.eye(coarse[axis])])
        field = np.moveaxis(np.tensordot(field, basis, axes=(axis, 0)), -1, axis)
    return np.asarray(field)


def _change_contrast(t1: Map, generator: np.random.Generator) -> Map:
    """Draw this subject's brightness of fluid, grey and white matter, in the order of a T1."""
    fluid = generator.uniform(0.08, 0.35)
    grey = generator.uniform(0.42, 0.70)
    white = grey + generator.uniform(0.12, 0.30)
    knots = (0.0, fluid, grey, white, white + 0.6 * (1.0 - _TISSUE[3]))
    return np.interp(t1, _TISSUE, knots).astype(np.float32)


def _simulate_scanner(image: Map, generator: np.random.Generator) -> NDArray[np.int16]:
    """Simulate coil sensitivity, blur, Rician noise and an arbitrary intensity scale."""
    bias = np.exp(generator.uniform(0.03, 0.15) * _draw_smooth_field(generator, [4, 4, 4], image.shape))
    blurred = ndimage.gaussian_filter(image, generator.uniform(0.0, 0.4))
    sigma = generator.uniform(0.008, 0.03)
    real = blurred * bias + sigma * generator.standard_normal(image.shape)
    imaginary = sigma * generator.standard_normal(image.shape)
    scaled = generator.uniform(400.0, 1500.0) * np.hypot(real, imaginary)
    return np.asarray(np.rint(np.clip(scaled, 0, np.iinfo(np.int16).max)), dtype=np.int16)
