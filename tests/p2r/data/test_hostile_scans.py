"""Fuzzed scans, lists and names end in a volume, a reason code or a named error, within bounds of time and memory.

The cases are the same on every run: hypothesis draws them from a fixed seed.
"""

import gzip
import io
import json
import os
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2r.config import IngestConfig
from p2r.data.read import read_scan
from p2r.data.scans import Scan, find_scans
from p2r.data.volume import read_labels, read_volume
from p2r.errors import DataError, RefusedScan

CODES = {
    "constant",
    "degenerate_affine",
    "dtype",
    "empty",
    "extent",
    "nonfinite",
    "not_3d",
    "not_fetched",
    "not_nifti",
    "too_large",
    "too_small",
    "truncated",
    "unreadable",
}
MAX_MIB = 2.0
CONFIG = IngestConfig(sources=("x",), licence="CC0-1.0", max_scan_mib=MAX_MIB, min_size=2, max_frames=3)
VOXELS = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
AFFINE = np.array([[-1.0, 0.1, 0, 5], [0.1, 1.5, 0, 6], [0, 0.2, 2.0, 7], [0, 0, 0, 1]])
KINDS = {
    "one.nii": nibabel.Nifti1Image,
    "two.nii": nibabel.Nifti2Image,
    "one.hdr": nibabel.Nifti1Pair,
    "two.hdr": nibabel.Nifti2Pair,
}


def cases(number: int) -> Any:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[bytes, bytes]]:
    """Bytes of header and voxels of valid scans, in one file or in two."""
    found = {}
    for name, kind in KINDS.items():
        image = kind(VOXELS, AFFINE)
        image.file_map = kind.make_file_map({part: io.BytesIO() for part in kind.make_file_map()})
        image.to_file_map()
        content = b"".join(file.fileobj.getvalue() for _, file in sorted(image.file_map.items()))
        found[name] = content[: -VOXELS.nbytes], content[-VOXELS.nbytes :]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the cases; checks that nothing is written to the working or temporary folder."""
    outside = tmp_path_factory.mktemp("outside")
    for name in ("scans", "working", "temporary"):
        (outside / name).mkdir()
    before, default = Path.cwd(), tempfile.tempdir
    os.chdir(outside / "working")
    tempfile.tempdir = str(outside / "temporary")
    yield outside / "scans"
    os.chdir(before)
    tempfile.tempdir = default
    assert sorted(path.name for path in outside.iterdir()) == ["scans", "temporary", "working"]
    assert not list((outside / "working").iterdir())
    assert not list((outside / "temporary").iterdir())


def outcome(path: Path) -> str:
    """Read a scan within bounds of time and memory; return its reason code, or `volume`."""
    files = sorted(path.parent.iterdir())
    scan = Scan(str(path), "scan", 0)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        (volume,) = read_scan(scan, CONFIG)
    except RefusedScan as refusal:
        assert refusal.code in CODES
        assert str(path.parent) in refusal.message or scan.key in refusal.message
        result = refusal.code
    else:
        assert volume.data.ndim == 4
        assert volume.data.dtype in (np.int8, np.uint8, np.int16, np.uint16, np.float32)
        assert volume.data.shape[3] <= 3
        assert np.isfinite(volume.data).all()
        assert np.isfinite(volume.affine).all()
        assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
        assert all(0 < size < 1e4 for size in volume.spacing_mm)
        result = "volume"
    finally:
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < 5
    # As stored, plus as float32 (four times the size of bytes), plus intermediate arrays of a chunk, plus buffers.
    assert peak < MAX_MIB * 2**20 * 5 + 12 * 2**20
    assert sorted(path.parent.iterdir()) == files
    return result


def write(folder: Path, name: str, parts: tuple[bytes, bytes], is_zipped: bool) -> Path:
    """Write a scan as the only one of the folder."""
    for path in folder.iterdir():
        path.unlink()
    suffix = ".gz" if is_zipped else ""
    header, voxels = parts
    single, pair = {f"scan.nii{suffix}": header + voxels}, {f"scan.hdr{suffix}": header, f"scan.img{suffix}": voxels}
    files = single if name.endswith(".nii") else pair
    for file, content in files.items():
        (folder / file).write_bytes(gzip.compress(content, 1, mtime=0) if is_zipped else content)
    return folder / next(iter(files))


FIELDS = {
    "one": {name: (info[1], info[0]) for name, info in nibabel.Nifti1Header.template_dtype.fields.items()},
    "two": {name: (info[1], info[0]) for name, info in nibabel.Nifti2Header.template_dtype.fields.items()},
}
# Fields that determine the position, number and scaling of voxels.
FIELDS_TO_CHANGE = (
    "dim", "dim", "dim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "pixdim", "sform_code", "qform_code", "srow_x",
    "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "magic", "sizeof_hdr", "xyzt_units",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 255, 256, 512, 1024, 1280, 1536, 1792, 2304, 32767, -32768, 2**31 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, 3e38, np.inf, -np.inf, np.nan, 352.0, 353.5, 1e5, 2**24, -352.0)


def change_field(header: bytearray, kind: str, draw: random.Random) -> None:
    """Write a hostile value into one header field, or into one element of it."""
    offset, dtype = FIELDS[kind][draw.choice(FIELDS_TO_CHANGE)]
    base, count = dtype.base, int(np.prod(dtype.shape, dtype=int))
    position = offset + draw.randrange(count) * base.itemsize
    if base.kind in "iu":
        value = draw.choice(NUMBERS) if draw.random() < 0.9 else draw.getrandbits(63) - 2**62
        header[position : position + base.itemsize] = np.array(value).astype(base).tobytes()
    elif base.kind == "f":
        with np.errstate(over="ignore"):
            header[position : position + base.itemsize] = np.array(draw.choice(REALS)).astype(base).tobytes()
    else:
        header[position : position + base.itemsize] = draw.randbytes(base.itemsize)


def test_hostile_headers(folder: Path, whole: dict[str, tuple[bytes, bytes]]) -> None:
    met: Counter[str] = Counter()

    @cases(700)
    @given(seed=st.integers(0, 2**32))
    def meet(seed: int) -> None:
        draw = random.Random(seed)
        name = draw.choice(sorted(KINDS))
        header, voxels = bytearray(whole[name][0]), whole[name][1]
        for _ in range(draw.choice((1, 1, 2, 3, 6))):
            change_field(header, name[:3], draw)
        voxels *= draw.choice((1, 1, 16))  # enough for types of 16 bytes, which would otherwise be refused as truncated
        met[outcome(write(folder, name, (bytes(header), voxels), draw.random() < 0.3))] += 1

    meet()
    # The fuzz test must reach every kind of refusal.
    missing = {"volume", *CODES} - {"unreadable", "not_fetched", "too_small"} - set(met)
    assert not missing, f"not met: {missing}; met: {dict(met)}"


def test_flipped_and_missing_bits(folder: Path, whole: dict[str, tuple[bytes, bytes]]) -> None:
    """In plain files a flipped bit of a voxel cannot be detected; in zipped files every change of the stream is."""
    met: Counter[str] = Counter()

    @cases(500)
    @given(seed=st.integers(0, 2**32))
    def meet(seed: int) -> None:
        met[flip_or_cut(folder, whole, seed)] += 1

    meet()
    assert {"volume", "not_nifti", "truncated", "unreadable"} <= set(met), dict(met)


def flip_or_cut(folder: Path, whole: dict[str, tuple[bytes, bytes]], seed: int) -> str:
    draw = random.Random(seed)
    name, is_zipped = draw.choice(sorted(KINDS)), draw.random() < 0.6
    path = write(folder, name, whole[name], is_zipped)
    target = draw.choice(sorted(folder.iterdir()))
    before = target.read_bytes()
    content = bytearray(before)
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    else:
        for _ in range(draw.choice((1, 1, 2, 9))):
            content[draw.randrange(10 if is_zipped else 0, len(content))] ^= 1 << draw.randrange(8)
    target.write_bytes(content)
    result = outcome(path)
    if result == "volume" and is_zipped:  # unused bits of the stream, or the same bit flipped twice
        assert gzip.decompress(content) == gzip.decompress(before)
    return result


ZEROS = gzip.compress(bytes(1 << 20), mtime=0)
LONG_ZEROS = gzip.compress(bytes(64 << 20), 1, mtime=0)


@cases(150)
@given(seed=st.integers(0, 2**32))
def test_gzip_bombs(folder: Path, whole: dict[str, tuple[bytes, bytes]], seed: int) -> None:
    """Streams far larger than the size in the header, or headers with a size far larger than the stream."""
    draw = random.Random(seed)
    header, voxels = bytearray(whole["one.nii"][0]), whole["one.nii"][1]
    sizes = [draw.choice((2, 5, 100, 1000, 32767)) for _ in range(3)]
    header[42:48] = np.array(sizes, "<i2").tobytes()
    path = write(folder, "one.nii", (bytes(header), voxels), True)
    num_mib, more = draw.choice([(0, b""), (5, ZEROS * 5), (64, LONG_ZEROS), (2000, ZEROS * 2000)])
    with path.open("ab") as file:
        file.write(more)
    result = outcome(path)
    promised_mib = 2 * int(np.prod(sizes, dtype=object)) / 2**20
    if promised_mib > MAX_MIB:
        assert result == "too_large"
    elif num_mib > promised_mib + 17:
        assert result == "unreadable"


def test_any_bytes(folder: Path) -> None:
    met: Counter[str] = Counter()

    @cases(250)
    @given(
        content=st.binary(max_size=700),
        head=st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\x08", b"\x1f\x8b\x08\x04"]),
    )
    def meet(content: bytes, head: bytes) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / "scan.nii.gz").write_bytes(head + content)
        met[outcome(folder / "scan.nii.gz")] += 1

    meet()
    assert set(met) <= {"not_nifti", "not_fetched", "truncated", "unreadable"}
    assert {"not_nifti", "truncated"} <= set(met), dict(met)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not_fetched"),
        (b"/annex/objects/SHA256E-s9--0.nii.gz\n", "not_fetched"),
        (b"", "not_nifti"),
        (gzip.compress(bytes(1000), mtime=0)[:-9], "truncated"),
    ],
)
def test_a_file_without_voxels_has_its_own_reason(folder: Path, content: bytes, code: str) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "scan.nii.gz").write_bytes(content)
    assert outcome(folder / "scan.nii.gz") == code


@cases(150)
@given(seed=st.integers(0, 2**32))
def test_hostile_labels_are_refused_like_scans(folder: Path, whole: dict[str, tuple[bytes, bytes]], seed: int) -> None:
    draw = random.Random(seed)
    header, voxels = bytearray(whole["one.nii"][0]), whole["one.nii"][1]
    for _ in range(2):
        change_field(header, "one", draw)
    path = write(folder, "one.nii", (bytes(header), voxels), False)
    try:
        assert read_labels(path).data.dtype == np.int16
    except RefusedScan as refusal:
        assert refusal.code in CODES | {"labels"}


NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]) | st.sampled_from(". -_\n\t*?[]#%:\\'\"$(;"),
    min_size=1,
    max_size=12,
)


@cases(150)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    suffix=st.sampled_from([".nii", ".nii.gz", ".hdr", ".img", ".dcm", "..nii", ".NII", ""]),
    link=st.sampled_from(["", "..", "scan", "/", "/dev/zero", "absent", "../../secret.nii"]),
)
def test_names_and_links(folder: Path, names: list[str], suffix: str, link: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        root = Path(inner, "root")
        root.mkdir()
        (root / "scan.nii").write_bytes(b"12345")
        Path(inner, "beside.nii").write_bytes(b"12345")
        for name in names:
            path = root / (name + suffix)
            if path.name in (".", "..") or path.exists():
                continue
            path.write_bytes(b"12345")
        if link:
            (root / "link.nii").symlink_to(link)
            (root / "folder").symlink_to(link)
        scans = find_scans([str(root)], cache=root)
        keys = [scan.key for scan in scans]
        assert len(set(keys)) == len(keys)
        assert all(set(key).isdisjoint("./\n\t\0 ") for key in keys)
        assert all(Path(scan.path).parent == root for scan in scans), "nothing outside is listed"
        for scan in scans:
            with pytest.raises(RefusedScan):
                read_scan(scan, CONFIG)
        json.dumps([scan.path for scan in scans])


VALUES = st.one_of(
    st.sampled_from(
        ["scan.nii", "./scan.nii", "../../../etc/passwd", "/dev/zero", "", "n/a", "~", "file:///", "s3://"]
    ),
    st.sampled_from(["link.nii", "folder", "http://x/y.nii", "scan.nii\0", "x" * 5000 + ".nii", "\u202e.nii", "a\rb"]),
    st.sampled_from(['"', '"scan.nii"x']),  # quotes that are left open, or end too early
    st.text(max_size=10),
)


@cases(300)
@given(
    rows=st.lists(st.lists(VALUES, min_size=1, max_size=3), max_size=3),
    columns=st.sampled_from([["path"], ["path", "subject"], ["subject", "path", "x"], ["file"], ["path", "path"]]),
    form=st.sampled_from(["csv", "tsv", "jsonl", "raw"]),
    noise=st.binary(max_size=12),
)
def test_lists(folder: Path, rows: list[list[str]], columns: list[str], form: str, noise: bytes) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "scan.nii").write_bytes(b"12345")
    (folder / "link.nii").symlink_to("/dev/zero")
    if form == "jsonl":
        content = "\n".join(json.dumps(dict(zip(columns, row, strict=False))) for row in rows).encode()
    else:
        separator = "\t" if form == "tsv" else ","
        lines = [columns, *rows]
        content = "\n".join(separator.join(line) for line in lines).encode("utf-8", "replace")
    name = "list." + ("csv" if form == "raw" else form)
    (folder / name).write_bytes(content + noise if form == "raw" else content)
    try:
        scans = find_scans([str(folder / name)], cache=folder)
    except DataError as error:
        assert name in str(error)
        assert len(str(error)) < 12_000
        return
    for scan in scans:
        assert Path(scan.path).name in {"scan.nii", "link.nii"}
        with pytest.raises(RefusedScan):
            read_scan(scan, CONFIG)


def test_a_volume_survives_the_harness(folder: Path, whole: dict[str, tuple[bytes, bytes]]) -> None:
    for name in KINDS:
        for is_zipped in (False, True):
            path = write(folder, name, whole[name], is_zipped)
            assert outcome(path) == "volume"
            np.testing.assert_array_equal(read_volume(path).data.sum(), VOXELS.sum())
