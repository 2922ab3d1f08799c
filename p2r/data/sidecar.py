"""The JSON sidecar of a scan -> technical tags of its acquisition, by an allow-list; everything else is dropped.

Names, dates, places, serial numbers and free text (`SeriesDescription`, `ProtocolName`, comments) may identify a person, and
dcm2niix keeps several of them even with its anonymisation option. So only tags on the list are kept, and only with values of
the listed kind. An unreadable sidecar does not affect the scan; it is ignored and counted.

In a BIDS data set a scan also inherits `.json` files from parent folders; nearer files take precedence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from p2r.data.bids import DESCRIPTION, applies, entities_of
from p2r.data.names import local_path, scan_key
from p2r.data.opening import bucket_client
from p2r.documents import read_json
from p2r.errors import InputError, StorageError

MAX_BYTES = 1 << 20
"""Largest sidecar that is read."""

_MAX_TEXT = 64
_MAX_ITEMS = 512
Kind = Literal["number", "text", "flag"]

_KINDS: dict[Kind, str] = {
    "number": """
        MagneticFieldStrength EchoTime EchoTime1 EchoTime2 EchoNumber EchoTrainLength RepetitionTime
        RepetitionTimeExcitation RepetitionTimePreparation InversionTime FlipAngle SliceThickness SpacingBetweenSlices
        SliceTiming PixelBandwidth DwellTime EffectiveEchoSpacing TotalReadoutTime NumberOfAverages AcquisitionMatrixPE
        ReconMatrixPE BaseResolution PercentPhaseFOV PercentSampling PartialFourier ParallelReductionFactorInPlane
        ParallelReductionFactorOutOfPlane MultibandAccelerationFactor
    """,
    "text": """
        Modality Manufacturer ManufacturersModelName BodyPart BodyPartExamined PatientPosition MRAcquisitionType
        ScanningSequence SequenceVariant SequenceName ScanOptions PulseSequenceType ImageType PhaseEncodingDirection
        InPlanePhaseEncodingDirectionDICOM ReceiveCoilName ReceiveCoilActiveElements CoilCombinationMethod MatrixCoilMode
        ParallelAcquisitionTechnique ConversionSoftware ConversionSoftwareVersion
    """,
    "flag": "SpoilingState MTState NonlinearGradientCorrection",
}
TAGS: dict[str, Kind] = {tag: kind for kind, tags in _KINDS.items() for tag in tags.split()}
"""Tags that are kept, by BIDS name, with the required kind of the value, or of every item of a list."""

_WORDS: dict[str, str] = {
    "Modality": "MR",
    "Manufacturer": "SIEMENS GE PHILIPS CANON TOSHIBA HITACHI UIH BRUKER ESAOTE VARIAN FUJIFILM",
    "MRAcquisitionType": "1D 2D 3D",
    "ScanningSequence": "SE IR GR EP RM",
    "SequenceVariant": "SK MTC SS TRSS SP MP OSP NONE",
    "ScanOptions": "PER RG CG PPG FC PFF PFP SP FS WE MT IR DB SAT1 SAT2 SAT3",
    "PulseSequenceType": "MPRAGE MP2RAGE SPGR FLASH FSE TSE EPI BSSFP TRUFI HASTE SPACE CUBE VISTA",
    "ImageType": """ORIGINAL DERIVED PRIMARY SECONDARY OTHER M P R I PHASE MAGNITUDE REAL IMAGINARY ND NORM DIS2D DIS3D FM MOSAIC FFE SE
        TE IR M_FFE M_SE M_IR AXIAL MPR MIP ADC FA TRACEW MEAN T1 T2 T2_STAR PROTON_DENSITY PERFUSION DIFFUSION FMRI WATER FAT
        IN_PHASE OUT_OF_PHASE NONE""",
    "BodyPart": "BRAIN HEAD HEART",
    "BodyPartExamined": """ABDOMEN ANKLE BRAIN BREAST CHEST CSPINE ELBOW FOOT HAND HEAD HEART HIP KNEE KIDNEY LIVER LSPINE NECK PELVIS
        PROSTATE SHOULDER SPINE TSPINE WHOLEBODY WRIST""",
    "PatientPosition": "HFS HFP HFDR HFDL FFS FFP FFDR FFDL",
    "PhaseEncodingDirection": "i j k i- j- k-",
    "InPlanePhaseEncodingDirectionDICOM": "ROW COL OTHER",
    "ParallelAcquisitionTechnique": "GRAPPA SENSE MSENSE CAIPIRINHA ARC ASSET SMASH PILS NONE",
    "ConversionSoftware": "dcm2niix",
}
_VOCABULARY = {tag: frozenset(words.split()) for tag, words in _WORDS.items()}
"""Words of DICOM and BIDS, and of a few manufacturers: the only text kept with pseudonyms. Text in other tags may have been
typed at the scanner."""


def closed_tags(tags: Mapping[str, object]) -> dict[str, object]:
    """Return the tags without free text: numbers, flags, and text of a closed vocabulary."""
    return {
        tag: value for tag, value in tags.items() if TAGS.get(tag) in ("number", "flag") or _is_vocabulary(tag, value)
    }


def _is_vocabulary(tag: str, value: Any) -> bool:
    known = _VOCABULARY.get(tag, frozenset())
    if isinstance(value, list):
        return all(_is_vocabulary(tag, item) for item in value)
    text = str(value)
    words = [text] if text in known else text.replace("\\", "_").split("_")
    return all(word in known or word.upper() in known for word in words)


def read_sidecar(path: str) -> tuple[dict[str, object], int]:
    """Return the tags of the scan at `path`, and the number of unusable JSON files or values.

    Args:
        path: Path or URL of a NIfTI file.

    Raises:
        StorageError: if a bucket cannot be read.
    """
    tags: dict[str, object] = {}
    num_ignored = 0
    bucket = bucket_client() if path.startswith("s3://") else None
    for sidecar in _find_sidecars(path, bucket):
        content = _read_content(sidecar, bucket)
        if content is not None:
            found, ignored = allowed_tags(content)
            tags |= found
            num_ignored += ignored
    return tags, num_ignored


def allowed_tags(content: bytes) -> tuple[dict[str, object], int]:
    """Return the listed tags of a JSON object, and the number of those without a usable value (1 for an unusable file)."""
    try:
        # Other programs write NaN; it becomes None, which no kind allows.
        value = read_json(content, where="a sidecar", max_bytes=MAX_BYTES, nan_as_none=True)
    except InputError:
        return {}, 1
    if not isinstance(value, dict):
        return {}, 1
    listed = {tag: value[tag] for tag in TAGS if tag in value}
    usable = {tag: found for tag, found in listed.items() if _is_usable(found, TAGS[tag])}
    return usable, len(listed) - len(usable)


def common_tags(parts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the tags that all parts of a series share."""
    first, *others = parts
    return {tag: value for tag, value in first.items() if all(other.get(tag) == value for other in others)}


def _is_usable(value: Any, kind: Kind) -> bool:
    if isinstance(value, list):
        return len(value) <= _MAX_ITEMS and all(not isinstance(item, list) and _is_usable(item, kind) for item in value)
    if kind == "flag" or isinstance(value, bool):
        return kind == "flag" and isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and abs(value) < 1e9
    return isinstance(value, str) and len(value) <= _MAX_TEXT and value.isascii() and value.isprintable()


def _find_sidecars(path: str, bucket: Any) -> list[str]:
    """Return the JSON files that apply to a scan, in increasing precedence."""
    folder, _, name = path.rpartition("/")
    levels = _dataset_folders(folder, bucket) if entities_of(name) else []
    # Within a folder, files with more entities take precedence, so they come last.
    return [
        f"{level}/{other}"
        for level in levels
        for other in sorted(_list_names(level, bucket), key=lambda other: (other.count("-"), other))
        if applies(other, name)
    ] or [f"{folder}/{scan_key(name)}.json"]


def _dataset_folders(folder: str, bucket: Any) -> list[str]:
    """Return the folders from the root of the data set down to `folder`; empty outside a data set."""
    below = []
    while folder.strip("/") and not folder.endswith(":/"):
        below.append(folder)
        local = local_path(folder)
        if (local / DESCRIPTION).is_file() if local is not None else DESCRIPTION in _list_names(folder, bucket):
            return below[::-1]
        folder = folder.rpartition("/")[0]
    return []


def _list_names(folder: str, bucket: Any) -> list[str]:
    try:
        if (local := local_path(folder)) is not None:
            return [entry.name for entry in local.iterdir()]
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in bucket.ls(folder, detail=False)]
    except (FileNotFoundError, PermissionError):
        return []  # folders above the data may be inaccessible
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {type(error).__name__}: {error}; check the network") from error


def _read_content(path: str, bucket: Any) -> bytes | None:
    """Return up to `MAX_BYTES` + 1 bytes of a file; None if it is absent."""
    try:
        if (local := local_path(path)) is not None:
            if not local.is_file():
                return None
            with local.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        content: bytes = bucket.cat_file(path, start=0, end=MAX_BYTES + 1)
        return content
    except FileNotFoundError:
        return None
    except PermissionError:
        return b""  # counted as unusable
    except OSError as error:
        raise StorageError(f"cannot read {path}: {type(error).__name__}: {error}; check the network") from error
