"""NIfTI files as people have them, each with its outcome: the table in docs/inputs.md.

    python -m tests.scan_cases > docs/inputs.md

Every image is a box of values that no turn or reflection leaves as it is. Nobody's data is in it.
"""

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel import affines
from numpy.typing import NDArray

from tests.dicom_cases import DICOM_CASES
from tests.folder_cases import FOLDER_CASES

SHAPE = (18, 20, 6)
GRID = np.array([[-1.5, 0, 0, 12.0], [0, 1.5, 0, -15.0], [0, 0, 6.0, -18.0], [0, 0, 0, 1]])
MM = (1.5, 1.5, 6.0)


def values(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[np.int16]:
    """Noise on a ramp along every axis, int16."""
    ramp = sum(np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))]) * (30 + 17 * axis)
               for axis, size in enumerate(shape))  # fmt: skip
    return (ramp + np.random.default_rng(seed).integers(1, 60, shape)).astype(np.int16)


def label_map(shape: tuple[int, ...] = SHAPE) -> NDArray[np.uint8]:
    """Two boxes, of the labels 1 and 2."""
    found = np.zeros(shape, np.uint8)
    found[3:8, 4:9, 1:4], found[9:15, 6:16, 2:5] = 1, 2
    return found


@dataclass(frozen=True)
class Scan:
    """A NIfTI file to be written."""

    data: Callable[[], NDArray[Any]] = values
    affine: Any = field(default_factory=GRID.copy)
    sform: int = 1
    qform: int = 1
    units: str = "mm"
    dtype: Any = None
    kind: Any = nibabel.Nifti1Image
    fields: tuple[tuple[int, str, tuple[Any, ...]], ...] = ()
    """Bytes of the header to overwrite: offset, format, values."""
    qform_of: Any = None
    """Another affine for the qform."""
    zooms: tuple[float, ...] = ()
    pack: Callable[[bytes], bytes] = gzip.compress
    """Makes the file's bytes of the image's."""

    def write(self, path: Path) -> None:
        """Write the file."""
        data = self.data()
        image = self.kind(data, self.affine, dtype=self.dtype or data.dtype)
        image.set_sform(self.affine, self.sform)
        image.set_qform(self.affine if self.qform_of is None else self.qform_of, self.qform)
        image.header.set_xyzt_units(self.units, "sec")
        if self.zooms:
            image.header.set_zooms(self.zooms)
        raw = bytearray(image.to_bytes())
        for offset, form, items in self.fields:
            struct.pack_into("<" + form, raw, offset, *items)
        path.write_bytes(self.pack(bytes(raw)))


@dataclass(frozen=True)
class Case:
    """A file and its outcome."""

    name: str
    """Words for the table, with the ending of the file."""
    scan: Scan | bytes
    mm: tuple[float, ...] = MM
    """Voxel size as read."""
    shape: tuple[int, ...] = (*SHAPE, 1)
    """Of the volume."""
    notes: tuple[str, ...] = ()
    refused: str = ""
    """Reason code; empty: it is read."""
    way_out: str = ""
    """Part of the refusal's message."""
    is_label: bool = False

    def write(self, folder: Path) -> Path:
        """Write the file."""
        path = folder / ("scan" + self.name[self.name.rindex(" .") + 1 :])
        if isinstance(self.scan, bytes):
            path.write_bytes(self.scan)
        else:
            self.scan.write(path)
        return path

    def row(self) -> str:
        """Line of the table."""
        size = " x ".join(f"{mm:g}" for mm in self.mm)
        noted = f", noted as `{'`, `'.join(self.notes)}`" if self.notes else ""
        done = f"refused: `{self.refused}`; {self.way_out}" if self.refused else f"read, {size} mm{noted}"
        return f"| {self.name.rpartition(' ')[0]} | `{self.name.rpartition(' ')[2]}` | {done} |"


def plain(raw: bytes) -> bytes:
    """Leave an image's bytes as they are."""
    return raw


def floats_with(value: float, where: Any) -> Callable[[], NDArray[Any]]:
    """A maker of real numbers, one value elsewhere."""

    def make() -> NDArray[Any]:
        data = values().astype(np.float32)
        data[where] = value
        return data

    return make


def frames(number: int, shape: tuple[int, ...] = SHAPE) -> Callable[[], NDArray[Any]]:
    """A maker of a series."""
    return lambda: np.stack([values(shape, seed) for seed in range(number)], -1)


def scaled(slope: float, intercept: float) -> Scan:
    """A scan with these scl_slope and scl_inter."""
    return Scan(fields=((112, "2f", (slope, intercept)),))


def turned(a: float, b: float) -> NDArray[np.float64]:
    """GRID, turned about two axes."""
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return affines.from_matvec(x @ z @ np.diag(MM), [3, -8, 12])


SHEARED = turned(0.2, 0.3) @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
LARGER = GRID @ np.diag([1.2, 1.2, 1.2, 1])
MIRRORED = np.diag([-1.0, 1, 1, 1]) @ GRID
SIZES = ((80, "3f", MM),)
ONES = np.eye(4)
COMPLEX = values().astype(np.complex64)
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
IN_MICRON = np.diag([100.0, 100, 500, 1])
AS_FLOAT128 = Scan(
    data=lambda: np.concatenate([values(), values()]).astype(np.float64),
    fields=((42, "h", (18,)), (70, "2h", (1536, 128))),
)

BEHIND_AXES = np.array([[0, 0, 6.0, 5], [-1.5, 0, 0, 6], [0, -1.5, 0, 7], [0, 0, 0, 1]])


def big_endian(data: NDArray[Any], affine: Any, dtype: Any) -> nibabel.Nifti1Image:
    """An image with the byte order of old scanners."""
    return nibabel.Nifti1Image(data, affine, nibabel.Nifti1Header(endianness=">"), dtype=dtype)


def extended(data: NDArray[Any], affine: Any, dtype: Any) -> nibabel.Nifti1Image:
    """An image with 8 MiB of text in its header."""
    image = nibabel.Nifti1Image(data, affine, dtype=dtype)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * (8 << 20)))
    return image


def half(magic: bytes) -> bytes:
    """The header of a scan in two files."""
    header = nibabel.Nifti1Image(values(), GRID).header
    return bytes(header.binaryblock[:344] + magic)


READ = [
    Case("as a scanner's converter writes it .nii.gz", Scan()),
    Case("upper-case ending .NII.GZ", Scan()),
    Case("gzipped, under a plain name .nii", Scan()),
    Case("not gzipped, under a gzipped name .nii.gz", Scan(pack=plain)),
    Case("NIfTI-2 .nii.gz", Scan(kind=nibabel.Nifti2Image)),
    Case("unit of length not set .nii.gz", Scan(units="unknown")),
    Case("unit of length metre .nii.gz", Scan(affine=GRID @ np.diag([1e-3, 1e-3, 1e-3, 1]), units="meter")),
    Case("unit of length micron .nii.gz", Scan(affine=IN_MICRON, units="micron"), mm=(0.1, 0.1, 0.5)),
    Case("qform only, oblique .nii.gz", Scan(affine=turned(0.2, 0.3), sform=0)),
    Case("sform only, oblique .nii.gz", Scan(affine=turned(0.2, 0.3), qform=0)),
    Case("sform with shear .nii.gz", Scan(affine=SHEARED, qform=0), mm=(1.5, 1.5074813, 6.0)),
    Case("no orientation at all .nii.gz", Scan(sform=0, qform=0)),
    Case("sform of a template, qform of the scanner .nii.gz", Scan(affine=LARGER, sform=4, qform_of=GRID), mm=(1.8, 1.8, 7.2)),
    Case("sform and qform mirrored to each other .nii.gz", Scan(affine=MIRRORED, qform_of=GRID)),
    Case("sform of ones, size only in pixdim .nii.gz", Scan(affine=ONES, sform=2, qform=0, fields=SIZES)),
    Case("sform of ones, size in a qform .nii.gz", Scan(affine=ONES, sform=1, qform=1, fields=SIZES)),
    Case("sform of the scanner of 1 mm, old pixdim .nii.gz", Scan(affine=ONES, qform=0, fields=SIZES), mm=(1.0, 1.0, 1.0)),
    Case("negative pixdim .nii.gz", Scan(sform=0, fields=((80, "f", (-1.5,)),))),
    Case("qfac of 0 .nii.gz", Scan(sform=0, fields=((76, "f", (0.0,)),))),
    Case("quaternion rounded above 1 .nii.gz", Scan(sform=0, fields=((256, "3f", (0.0, 1.0000004, 0.0)),))),
    Case("trailing axes of 1 .nii.gz", Scan(data=lambda: values()[..., None, None])),
    Case("dim[0] of 7 .nii.gz", Scan(fields=((40, "h", (7,)),))),
    Case("bitpix that does not fit .nii.gz", Scan(fields=((72, "h", (32,)),))),
    Case("a series in time .nii.gz", Scan(data=frames(3), zooms=(*MM, 0.04)), shape=(*SHAPE, 3)),
    Case("one plane .nii.gz", Scan(data=lambda: values()[:, :, 2:3]), shape=(18, 20, 1, 1)),
    Case("one plane in time .nii.gz", Scan(data=frames(5, (18, 20, 1))), shape=(18, 20, 1, 5)),
    Case("64-bit real numbers .nii.gz", Scan(data=lambda: values() * 0.37)),
    Case("64-bit whole numbers .nii.gz", Scan(data=lambda: values().astype(np.int64), kind=nibabel.Nifti1Image)),
    Case("32-bit whole numbers, large .nii.gz", Scan(data=lambda: values().astype(np.uint32) * 100)),
    Case("8-bit whole numbers .nii.gz", Scan(data=lambda: (values() // 16).astype(np.int8))),
    Case("16-bit whole numbers above 32767 .nii.gz", Scan(data=lambda: values().astype(np.uint16) * 30 + 30000)),
    Case("negative values only .nii.gz", Scan(data=lambda: values() - np.int16(5000))),
    Case("phase in radians .nii.gz", Scan(data=lambda: (values() / 300 - np.pi).astype(np.float32))),
    Case("one voxel of 3e38 .nii.gz", Scan(data=floats_with(3e38, (1, 1, 1)))),
    Case("scl_slope of 0 .nii.gz", scaled(0.0, 5.0)),
    Case("scl_slope of NaN .nii.gz", scaled(np.nan, np.nan)),
    Case("scl_slope infinite .nii.gz", scaled(np.inf, 0.0)),
    Case("scl_slope of 1/2 .nii.gz", scaled(0.5, -10.0)),
    Case("scl_slope negative .nii.gz", scaled(-2.0, 100.0)),
    Case("scl_slope tiny .nii.gz", scaled(1.02e-8, 0.0)),
    Case("NaN outside of the head .nii.gz", Scan(data=floats_with(np.nan, np.s_[:5])), notes=("nan_voxels=600",)),
    Case("one voxel NaN .nii.gz", Scan(data=floats_with(np.nan, (1, 1, 1))), notes=("nan_voxels=1",)),
    Case("vox_offset of 0 .nii", Scan(fields=((108, "f", (0.0,)),), pack=plain)),
    Case("vox_offset of 352.5 .nii", Scan(fields=((108, "f", (352.5,)),), pack=plain)),
    Case("gzip in several members .nii.gz", Scan(pack=lambda raw: gzip.compress(raw[:500]) + gzip.compress(raw[500:]))),
    Case("zeros after the gzip stream .nii.gz", Scan(pack=lambda raw: gzip.compress(raw) + bytes(512))),
    Case("other bytes after the gzip stream .nii.gz", Scan(pack=lambda raw: gzip.compress(raw) + b"more" * 99), notes=("trailing_bytes",)),
    Case("big-endian .nii.gz", Scan(kind=big_endian)),
    Case("8 MiB of text in the header .nii.gz", Scan(kind=extended)),
    Case("axes in another order .nii.gz", Scan(affine=BEHIND_AXES), mm=(6.0, 1.5, 1.5), shape=(6, 18, 20, 1)),
    Case("turned by 45 degrees .nii.gz", Scan(affine=turned(0.0, np.pi / 4), qform=0)),
    Case("whole numbers stored as real ones .nii.gz", Scan(data=lambda: values().astype(np.float32))),
    Case("zeros after the voxels .nii", Scan(pack=lambda raw: raw + bytes(2 << 20)), notes=("trailing_bytes",)),
]  # fmt: skip

REFUSED = [
    Case(
        "time as the fifth axis .nii.gz",
        Scan(data=lambda: frames(4)()[..., None, :]),
        refused="not_3d",
        way_out="save one volume",
    ),
    Case("a header without its voxels .hdr", half(b"ni1\0"), refused="unreadable", way_out="needs both"),
    Case("voxels without their header .img", bytes(4320), refused="unreadable", way_out="needs both"),
    Case("a header of ANALYZE 7.5 .hdr", half(bytes(4)), refused="not_nifti", way_out="convert it again"),
    Case(
        "extent of 12 m: micron without a unit .nii.gz",
        Scan(affine=np.diag([700.0, 700, 700, 1])),
        refused="extent",
        way_out="set_xyzt_units",
    ),
    Case(
        "extent of 36 um: metre without a unit .nii.gz",
        Scan(affine=np.diag([2e-6, 2e-6, 6e-6, 1])),
        refused="extent",
        way_out="set_xyzt_units",
    ),
    Case(
        "pixdim of 0, no sform .nii.gz",
        Scan(sform=0, qform=0, fields=((80, "3f", (0.0, 0.0, 0.0)),)),
        refused="degenerate_affine",
        way_out="set_zooms",
    ),
    Case(
        "pixdim of 0, qform .nii.gz",
        Scan(sform=0, fields=((80, "3f", (0.0, 0.0, 0.0)),)),
        refused="degenerate_affine",
        way_out="set_zooms",
    ),
    Case(
        "quaternion far from 1 .nii.gz",
        Scan(sform=0, fields=((256, "3f", (0.8, 0.7, 0.1)),)),
        refused="degenerate_affine",
        way_out="convert the scan again",
    ),
    Case(
        "sform of zeros .nii.gz",
        Scan(fields=((280, "12f", (0.0,) * 12),)),
        refused="degenerate_affine",
        way_out="set its sform",
    ),
    Case(
        "sform with NaN .nii.gz",
        Scan(fields=((280, "f", (np.nan,)),)),
        refused="degenerate_affine",
        way_out="set its sform",
    ),
    Case(
        "vectors .nii.gz",
        Scan(data=lambda: np.stack([values()] * 3, -1)[..., None, :]),
        refused="not_3d",
        way_out="save one volume",
    ),
    Case("two axes .nii.gz", Scan(data=lambda: values()[..., 0]), refused="not_3d", way_out="(X, Y, 1)"),
    Case(
        "dim[4] of 0 .nii.gz",
        Scan(fields=((40, "5h", (4, *SHAPE, 0)),)),
        refused="empty",
        way_out="correct the header's dim",
    ),
    Case("colours .nii.gz", Scan(data=lambda: RGB), refused="dtype", way_out="save it as one of these"),
    Case("complex numbers .nii.gz", Scan(data=lambda: COMPLEX), refused="dtype", way_out="save it as one of these"),
    Case("128-bit real numbers .nii.gz", AS_FLOAT128, refused="dtype", way_out="float128 (NIfTI code 1536)"),
    Case(
        "values that 32 bits cannot tell apart .nii.gz",
        Scan(data=lambda: values().astype(np.uint64) + 2**50),
        refused="constant",
        way_out="subtract an offset",
    ),
    Case(
        "an infinite voxel .nii.gz",
        Scan(data=floats_with(np.inf, (1, 1, 1))),
        refused="nonfinite",
        way_out="replace them",
    ),
    Case("scl_inter of NaN .nii.gz", scaled(1.0, np.nan), refused="nonfinite", way_out="correct scl_slope"),
    Case(
        "vox_offset of 348 .nii",
        Scan(fields=((108, "f", (348.0,)),), pack=plain),
        refused="not_nifti",
        way_out="write the file again",
    ),
    Case(
        "gzip stream cut .nii.gz",
        Scan(pack=lambda raw: gzip.compress(raw)[:-2000]),
        refused="truncated",
        way_out="copy it again",
    ),
    Case(
        "checksum of the gzip stream wrong .nii.gz",
        Scan(pack=lambda raw: gzip.compress(raw)[:-8] + b"\1" * 8),
        refused="unreadable",
        way_out="copy it again",
    ),
    Case(
        "gzipped twice .nii.gz",
        Scan(pack=lambda raw: gzip.compress(gzip.compress(raw))),
        refused="not_nifti",
        way_out="gunzip it once",
    ),
    Case("cut .nii", Scan(pack=lambda raw: raw[:-900]), refused="truncated", way_out="copy it again"),
    Case("no bytes .nii.gz", b"", refused="not_nifti", way_out="copy or convert it again"),
    Case(
        "a web page .nii.gz",
        b"<!DOCTYPE html><html>sign in</html>" * 30,
        refused="not_nifti",
        way_out="download it again",
    ),
    Case(
        "a pointer of Git LFS .nii.gz",
        b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
        refused="not_fetched",
        way_out="git lfs pull",
    ),
    Case(
        "a pointer of git-annex .nii.gz",
        b"/annex/objects/MD5E-s1--0.nii.gz\n",
        refused="not_fetched",
        way_out="datalad get",
    ),
    Case(
        "17 MiB of zeros after the voxels .nii",
        Scan(pack=lambda raw: raw + bytes(17 << 20)),
        refused="unreadable",
        way_out="correct the header's dim",
    ),
    Case(
        "one value nearly everywhere .nii.gz",
        Scan(data=lambda: (label_map() * (np.indices(SHAPE).sum(0) == 16)).astype(np.int16)),
        refused="constant",
        way_out="leave the scan out",
    ),
]

LABELS = [
    Case("label map of real numbers .nii.gz", Scan(data=lambda: label_map().astype(np.float32)), is_label=True),
    Case(
        "label map scaled: 1 reads 1.0000153 .nii.gz",
        Scan(data=lambda: label_map().astype(np.int16), fields=((112, "2f", (1.0000153, 0.0)),)),
        is_label=True,
    ),
    Case(
        "label map scaled by 1/127 .nii.gz",
        Scan(data=lambda: label_map() * 127, fields=((112, "2f", (1 / 127, 0.0)),)),
        is_label=True,
    ),
    Case("label map of 64-bit numbers .nii.gz", Scan(data=lambda: label_map().astype(np.int64)), is_label=True),
    Case("label map with an axis of 1 .nii.gz", Scan(data=lambda: label_map()[..., None]), is_label=True),
    Case(
        "label map with fractions .nii.gz",
        Scan(data=lambda: label_map() * np.float32(0.7)),
        is_label=True,
        refused="labels",
        way_out="nearest neighbour",
    ),
    Case(
        "label map 2e-3 off whole numbers .nii.gz",
        Scan(data=lambda: label_map() * np.float32(1.002)),
        is_label=True,
        refused="labels",
        way_out="round them",
    ),
    Case(
        "label map with negative values .nii.gz",
        Scan(data=lambda: -label_map().astype(np.int16)),
        is_label=True,
        refused="labels",
        way_out="replace others by 0 or a class",
    ),
    Case(
        "label map with NaN .nii.gz",
        Scan(data=floats_with(np.nan, (1, 1, 1))),
        is_label=True,
        refused="nonfinite",
        way_out="set them to 0",
    ),
]

CASES = [*READ, *REFUSED, *LABELS]


@dataclass(frozen=True)
class PairCase:
    """A label map beside its scan in a task, and its outcome."""

    name: str
    label: Scan
    refused: str = ""
    """Part of the refusal's message; empty: the pair is read."""

    def row(self) -> str:
        """Line of the table."""
        return f"| {self.name} | label map of a task | {f'refused: {self.refused}' if self.refused else 'read'} |"


CANONICAL = affines.from_matvec(np.diag(MM), [-13.5, -15.0, -18.0])

PAIRS = [
    PairCase("on the scan's grid", Scan(data=label_map)),
    PairCase("0.0001 mm beside the scan", Scan(data=label_map, affine=GRID + 1e-4)),
    PairCase(
        "0.002 mm beside the scan",
        Scan(data=label_map, affine=GRID + np.eye(4, k=3) * 2e-3),
        "copy the image's affine if the voxels do match",
    ),
    PairCase("saved in another orientation", Scan(data=lambda: label_map()[::-1], affine=CANONICAL)),
    PairCase("mirrored", Scan(data=label_map, affine=MIRRORED), "restore the pairs"),
    PairCase(
        "without orientation and voxel size",
        Scan(data=label_map, affine=ONES),
        "copy the image's affine if the voxels do match",
    ),
    PairCase("a slice short", Scan(data=lambda: label_map()[..., :5]), "resample the label map to its image"),
    PairCase(
        "a channel for each class",
        Scan(data=lambda: np.stack([label_map() == 1, label_map() == 2], -1).astype(np.uint8)),
        "resample the label map to its image",
    ),
    PairCase("255 for the organ", Scan(data=lambda: (label_map() > 0) * np.uint8(255)), "add the class to the task"),
]


def table() -> str:
    """The page of documentation."""
    files = [*(case.row() for case in CASES), *(case.row() for case in DICOM_CASES)]
    label_maps, sources = [case.row() for case in PAIRS], [case.row() for case in FOLDER_CASES]
    return (
        "# Scans as people have them\n\n"
        "Treatment of odd and broken files. Everything that is read keeps its place. An image that `p2r predict` writes on\n"
        "a scan's grid has the scan's sform, qform, codes, units and spacing in time, so that it overlays the scan in every viewer. A\n"
        "refusal has a reason code and names the way out; in a corpus, both are in the ledger.\n\n"
        "This table is written by `python -m tests.scan_cases > docs/inputs.md`; a test holds every line of it.\n\n"
        + _rows("file | ending | outcome", files)
        + "\n## Label maps of a task\n\n"
        "A label map must be on the grid of its scan, in any orientation.\n\n"
        + _rows("label map | kind | outcome", label_maps)
        + "\n## Folders, lists and tasks\n\n"
        "A refusal names the file, and of a list the line.\n\n" + _rows("source | kind | outcome", sources)
    )


def _rows(heading: str, rows: list[str]) -> str:
    return f"| {heading} |\n|---|---|---|\n" + "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
