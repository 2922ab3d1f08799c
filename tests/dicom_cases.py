"""DICOM series as scanners and archives leave them, each with its outcome: a part of docs/inputs.md."""

import io
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MRImageStorage,
    RLELossless,
)

ROWS, COLUMNS, SLICES = 20, 18, 8


def voxels(seed: int = 0) -> NDArray[np.uint16]:
    """Values (X, Y, Z) in the order of the files."""
    return np.random.default_rng(seed).integers(1, 900, (COLUMNS, ROWS, SLICES)).astype("<u2")


@dataclass(frozen=True)
class Series:
    """Files of one folder."""

    each: Callable[[int], Mapping[str, Any]] = lambda k: {}
    """Tags of slice k; None removes one."""
    slices: tuple[int, ...] = tuple(range(SLICES))
    step_mm: float = 3.0
    name: str = "IM{:04d}.dcm"
    after: Callable[[Path], None] = lambda folder: None
    """Changes the folder."""
    echoes: int = 1
    times: int = 1
    """Images of each slice, 40 ms apart."""

    def write(self, folder: Path) -> None:
        """Write the files."""
        folder.mkdir(parents=True)
        for number in range(self.echoes * self.times):
            for k in self.slices:
                file = self._slice(k, number % self.echoes)
                if self.times > 1:
                    file.TriggerTime, file.InstanceNumber = 40.0 * number, self.times * k + number + 1
                    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{number}.{k + 1}")
                    file.PixelData = np.ascontiguousarray(voxels(number)[:, :, k].T).tobytes()
                file.save_as(folder / self.name.format(1000 * number + k + 1), enforce_file_format=True)
        self.after(folder)

    def _slice(self, k: int, echo: int) -> pydicom.Dataset:
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        values: dict[str, Any] = {
            **{"SOPClassUID": MRImageStorage, "SOPInstanceUID": f"1.2.3.{echo}.{k + 1}", "SeriesInstanceUID": "1.2.6"},
            **{
                "StudyInstanceUID": "1.2.4",
                "FrameOfReferenceUID": "1.2.5",
                "Modality": "MR",
                "Manufacturer": "SIEMENS",
            },
            **{"PatientID": "P", "SeriesNumber": 3, "InstanceNumber": 100 * echo + k + 1, "AcquisitionNumber": 1},
            **{"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "ScanningSequence": "GR", "MRAcquisitionType": "2D"},
            **{"EchoTime": 3.0 * (echo + 1), "EchoNumbers": echo + 1, "RepetitionTime": 2000.0, "FlipAngle": 9.0},
            **{"SliceThickness": 3.0, "SpacingBetweenSlices": self.step_mm, "PixelSpacing": [1.0, 1.0]},
            **{"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-9, -10, self.step_mm * k]},
            **{"Rows": ROWS, "Columns": COLUMNS, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"},
            **{"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0},
            "PixelData": np.ascontiguousarray(voxels(echo)[:, :, k].T).tobytes(),
            **self.each(k),
        }
        for tag, value in values.items():
            if value is not None:
                setattr(header, tag, value)
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        return header


@dataclass(frozen=True)
class DicomCase:
    """A series and its outcome."""

    name: str
    series: Series = field(default_factory=Series)
    shapes: tuple[tuple[int, ...], ...] = ((COLUMNS, ROWS, SLICES, 1),)
    """Of the volumes."""
    mm: tuple[float, ...] = (1.0, 1.0, 3.0)
    values: Callable[[NDArray[Any]], NDArray[Any]] | None = lambda stored: stored
    """Of the first volume, from those stored; None: not compared."""
    refused: str = ""
    way_out: str = ""

    def row(self) -> str:
        """Line of the table."""
        size = " x ".join(f"{mm:g}" for mm in self.mm)
        volumes = f"{len(self.shapes)} volume{'s' * (len(self.shapes) > 1)}"
        done = f"refused: `{self.refused}`; {self.way_out}" if self.refused else f"read, {volumes}, {size} mm"
        return f"| {self.name} | DICOM | {done} |"


def _compress(folder: Path) -> None:
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        header.save_as(path, enforce_file_format=True)


def _encode(syntax: UID, form: str, **options: Any) -> Callable[[Path], None]:
    """Return a change of files to a transfer syntax that Pillow can encode."""

    def encode(folder: Path) -> None:
        for path in folder.iterdir():
            header, encoded = pydicom.dcmread(path), io.BytesIO()
            pixels = header.pixel_array
            if form == "JPEG":  # 8 bits
                pixels = (pixels // 4).astype(np.uint8)
                header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
            Image.fromarray(pixels).save(encoded, form, **options)
            header.PixelData = encapsulate([encoded.getvalue()])
            header.file_meta.TransferSyntaxUID = syntax
            header["PixelData"].is_undefined_length = True
            header.save_as(path, enforce_file_format=True)

    return encode


def _element(name: str, items: tuple[str, ...]) -> bytes:
    """An element of Siemens' CSA header, version 2."""
    padded = (*items, *[""] * (6 - len(items)))
    texts = [f"{item}\0".encode() if item else b"" for item in padded]
    head = name.encode().ljust(64, b"\0") + struct.pack("<i4s3i", len(items), b"US\0\0", 0, 6, 77)
    return head + b"".join(
        struct.pack("<4i", *[len(text)] * 2, 77, len(text)) + text + bytes(-len(text) % 4) for text in texts
    )


def _tile(*, with_private_tags: bool) -> Callable[[Path], None]:
    """Return a change of a series into Siemens mosaics: one file per time, all slices in it as tiles."""
    private = [("NumberOfImagesInMosaic", (str(SLICES),)), ("SliceNormalVector", ("0.0", "0.0", "1.0"))]
    csa = b"SV10\4\3\2\1" + struct.pack("<2I", len(private), 77) + b"".join(_element(*one) for one in private)

    def tile(folder: Path) -> None:
        first, *others = sorted(folder.iterdir())
        header = pydicom.dcmread(first)
        for path in (first, *others):
            path.unlink()
        for time in range(3):
            tiles = np.zeros((3 * ROWS, 3 * COLUMNS), "<u2")
            for k in range(SLICES):
                row, column = k // 3 * ROWS, k % 3 * COLUMNS
                tiles[row : row + ROWS, column : column + COLUMNS] = voxels(time)[:, :, k].T
            header.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
            header.Rows, header.Columns, header.PixelData = *tiles.shape, tiles.tobytes()
            header.ImagePositionPatient = [-9 - COLUMNS, -10 - ROWS, 0]  # of the tiles' corner, about the same centre
            header.InstanceNumber = header.AcquisitionNumber = time + 1
            header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.9.{time + 1}")
            if with_private_tags:
                block = header.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
                block.add_new(0x08, "CS", "IMAGE NUM 4")
                block.add_new(0x10, "OB", csa)
            header.save_as(folder / f"{time}.dcm", enforce_file_format=True)

    return tile


def _copy_all(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        shutil.copy(path, folder / f"copy_{path.name}")


def _strip_preamble(folder: Path) -> None:
    """Write the files as old archives do: implicit types, and neither preamble nor file meta information."""
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        del header.file_meta
        header.preamble = None
        header.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)


def _add_other_series(folder: Path) -> None:
    other = Series(each=lambda k: {"SeriesInstanceUID": "1.2.9", "SeriesNumber": 4, "SOPInstanceUID": f"1.2.8.{k + 1}"})
    other.write(folder / "other")
    for path in (folder / "other").iterdir():
        path.rename(folder / f"other_{path.name}")
    (folder / "other").rmdir()


def _copy_one(folder: Path) -> None:
    path = min(folder.iterdir())
    shutil.copy(path, folder / f"copy_{path.name}")


TURNED = ([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1])
UNEVEN: dict[str, Any] = {"refused": "uneven_slices", "way_out": "copy the series again"}

DICOM_CASES = [
    DicomCase("one file a slice"),
    DicomCase("names without an ending", Series(name="IM{:04d}")),
    DicomCase("names that end in .IMA", Series(name="X.MR.{:04d}.IMA")),
    DicomCase("names that are UIDs", Series(name="1.2.840.{:d}")),
    DicomCase("every file twice", Series(after=_copy_all)),
    DicomCase("no patient", Series(each=lambda k: {"PatientID": None})),
    DicomCase("instance numbers backwards", Series(each=lambda k: {"InstanceNumber": 100 - k})),
    DicomCase("one instance number for all slices", Series(each=lambda k: {"InstanceNumber": 1})),
    DicomCase(
        "a time of its own for every slice",
        Series(each=lambda k: {"AcquisitionTime": f"12{k:02d}00", "StudyTime": f"12{k:02d}00"}),
    ),
    DicomCase(
        "positions that jitter by 4 um",
        Series(each=lambda k: {"ImagePositionPatient": [-9, -10, 3 * k + 0.004 * (k % 3)]}),
    ),
    DicomCase(
        "gaps between slices, not stated",
        Series(step_mm=5.0, each=lambda k: {"SpacingBetweenSlices": None}),
        mm=(1.0, 1.0, 5.0),
    ),
    DicomCase(
        "the first two slices absent",
        Series(slices=tuple(range(2, SLICES))),
        shapes=((COLUMNS, ROWS, SLICES - 2, 1),),
        values=None,
    ),
    DicomCase("a slice absent in the middle", Series(slices=tuple(k for k in range(SLICES) if k != 4)), **UNEVEN),
    DicomCase(
        "a slice absent in the middle, another one twice",
        Series(slices=tuple(k for k in range(SLICES) if k != 4), after=_copy_one),
        **UNEVEN,
    ),
    DicomCase(
        "every second slice absent",
        Series(slices=tuple(range(0, SLICES, 2))),
        shapes=((COLUMNS, ROWS, SLICES // 2, 1),),
        mm=(1.0, 1.0, 6.0),
        values=None,
    ),
    DicomCase(
        "two series in one folder",
        Series(after=_add_other_series),
        shapes=((COLUMNS, ROWS, SLICES, 1),) * 2,
    ),
    DicomCase("neither preamble nor file meta information", Series(after=_strip_preamble)),
    DicomCase("signed numbers", Series(each=lambda k: {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15})),
    DicomCase(
        "rescale slope and intercept",
        Series(each=lambda k: {"RescaleSlope": 2.5, "RescaleIntercept": -10.0}),
        values=lambda stored: stored * 2.5 - 10,
    ),
    DicomCase(
        "a rescale slope of its own for every slice",
        Series(each=lambda k: {"RescaleSlope": 1 + k / 8, "RescaleIntercept": 0.0}),
        values=lambda stored: stored * (1 + np.arange(SLICES) / 8),
    ),
    DicomCase("compressed by run lengths", Series(after=_compress)),
    DicomCase(
        "JPEG 2000 without loss", Series(after=_encode(JPEG2000Lossless, "JPEG2000", irreversible=False, no_jp2=True))
    ),
    DicomCase("JPEG of 8 bits, with loss", Series(after=_encode(JPEGBaseline8Bit, "JPEG", quality=95)), values=None),
    DicomCase("two echoes", Series(echoes=2), shapes=((COLUMNS, ROWS, SLICES, 1),) * 2),
    DicomCase("a cine: each slice at four times", Series(times=4), shapes=((COLUMNS, ROWS, SLICES, 4),)),
    DicomCase(
        "a cine with a series for each slice",
        Series(times=4, each=lambda k: {"SeriesInstanceUID": f"1.2.6.{k}", "SeriesNumber": 10 + k}),
        shapes=((COLUMNS, ROWS, SLICES, 4),),
    ),
    DicomCase(
        "a cine that lacks one image",
        Series(times=4, after=lambda folder: sorted(folder.iterdir())[10].unlink()),
        refused="uneven_slices",
        way_out="copy the series again",
    ),
    DicomCase(
        "a cine that lacks a slice",
        Series(times=4, slices=tuple(k for k in range(SLICES) if k != 4)),
        **UNEVEN,
    ),
    DicomCase(
        "mosaics of three times",
        Series(after=_tile(with_private_tags=True)),
        shapes=((COLUMNS, ROWS, SLICES, 3),),
    ),
    DicomCase(
        "mosaics without private tags",
        Series(after=_tile(with_private_tags=False)),
        refused="mosaic",
        way_out="one image per slice",
    ),
    DicomCase(
        "a localizer in three orientations",
        Series(slices=(0, 1, 2), each=lambda k: {"ImageOrientationPatient": TURNED[k]}),
        shapes=((COLUMNS, ROWS, 1, 1), (1, COLUMNS, ROWS, 1), (COLUMNS, 1, ROWS, 1)),
        values=None,
    ),
    DicomCase(
        "no modality",
        Series(each=lambda k: {"Modality": None}),
        refused="not_mr",
        way_out="convert the series to NIfTI",
    ),
    DicomCase(
        "text in the picture",
        Series(each=lambda k: {"BurnedInAnnotation": "YES"}),
        refused="burned_in_annotation",
        way_out="leave it out",
    ),
]
