import contextlib
import hashlib
import io
import json
import os
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r.data.preprocess import percentile_table, volume_to_planes
from p2r.data.shards import (
    decode_record,
    encode_record,
    index_shard,
    open_shard,
    read_index,
    voxels_sha256,
    write_shard,
)
from p2r.data.volume import Volume, read_volume
from p2r.errors import DataError

# Stock webdataset leaves the tar open for the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)

OBLIQUE = np.array([[-1.4, 0.1, 0.6, 70.0], [0.2, 1.5, 3.0, -60.0], [0.1, -0.5, 9.0, 20.0], [0, 0, 0, 1]])


def a_scan(
    folder: Path, name: str, *, dtype: str = "int16", shape: tuple[int, ...] = (20, 18, 5), seed: int = 0
) -> Path:
    voxels = np.random.default_rng(seed).normal(100, 40, shape).astype(dtype)
    path = folder / f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, OBLIQUE), path)
    return path


def a_record(path: Path, *, axis: int = 2) -> tuple[Volume, dict[str, Any]]:
    volume = read_volume(path)
    meta = {
        "key": volume.key,
        "subject": volume.key,
        "cohort": "test",
        "slice_axis": axis,
        "percentiles": list(percentile_table(volume.data)),
        "source": path.name,
        "voxels_sha256": voxels_sha256(volume),
        "licence": "CC0-1.0",
    }
    return volume, meta


SCANS: dict[str, dict[str, Any]] = {
    "int16": {"dtype": "int16"},
    "float": {"dtype": "float32"},
    "bytes": {"dtype": "uint8"},
    "cine": {"dtype": "int16", "shape": (20, 18, 5, 3)},
    "tiny": {"dtype": "float32", "shape": (3, 2, 2)},
}


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    return [a_scan(tmp_path, name, seed=seed, **options) for seed, (name, options) in enumerate(SCANS.items())]


def stock_samples(tar: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(str(tar), shardshuffle=False))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stock_webdataset_and_five_lines_of_code_read_the_voxels_of_nibabel(
    tmp_path: Path, scans: list[Path], axis: int
) -> None:
    write_shard(tmp_path / "shard.tar", [a_record(path, axis=axis) for path in scans])
    samples = stock_samples(tmp_path / "shard.tar")
    assert [sample["__key__"] for sample in samples] == list(SCANS)
    for sample, path in zip(samples, scans, strict=True):
        meta, raw = json.loads(sample["json"]), sample["planes"]
        cuts = pairwise(meta["chunk_offsets"])
        planes = [np.frombuffer(blosc2.decompress2(raw[a:b]), meta["dtype"]) for a, b in cuts]
        voxels = np.moveaxis(np.reshape(planes, meta["stored_shape"]), (0, 1), (3, meta["slice_axis"]))

        canonical = nibabel.as_closest_canonical(nibabel.load(path))
        expected = np.asarray(canonical.dataobj).reshape(voxels.shape)
        assert voxels.dtype == expected.dtype.newbyteorder("<")
        np.testing.assert_array_equal(voxels, expected)
        np.testing.assert_allclose(meta["affine"], canonical.affine)
        np.testing.assert_allclose(meta["source_affine"], OBLIQUE, rtol=1e-6)
        np.testing.assert_array_equal(decode_record(raw, meta), expected)


def test_every_slice_is_read_by_its_number(tmp_path: Path, scans: list[Path]) -> None:
    records = [a_record(path, axis=axis % 3) for axis, path in enumerate(scans)]
    entry = write_shard(tmp_path / "shard.tar", records)
    reader = open_shard(tmp_path / "shard.tar")
    planes = [plane for volume, meta in records for plane in volume_to_planes(volume.data, meta["slice_axis"])]
    assert reader.num_samples == entry.num_samples == len(planes)
    assert entry.num_records == len(scans)
    for number, plane in enumerate(planes):
        found = reader.read_plane(number)
        assert found.dtype == plane.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, plane)
    with pytest.raises(ValueError, match="samples, got number"):
        reader.read_plane(len(planes))


LAYOUTS = [("planes", "lz4"), ("planes", "zstd"), ("blocks", "lz4"), ("blocks", "zstd"), ("npy", "lz4")]


@pytest.mark.parametrize(("record", "codec"), LAYOUTS)
def test_every_layout_gives_volumes_planes_and_boxes(tmp_path: Path, record: Any, codec: Any) -> None:
    path = a_scan(tmp_path, "cine", shape=(70, 33, 40, 2))
    for axis in range(3):
        volume, meta = a_record(path, axis=axis)
        write_shard(tmp_path / "shard.tar", [(volume, meta)], record=record, codec=codec)
        (sample,) = stock_samples(tmp_path / "shard.tar")
        np.testing.assert_array_equal(decode_record(sample[record], json.loads(sample["json"])), volume.data)
        reader = open_shard(tmp_path / "shard.tar")
        frames = np.moveaxis(volume.data, (3, axis), (0, 1))  # (T, P, h, w)
        row, frame = reader.locate_volume(1)
        assert frame == 1 and row.stored_shape == frames.shape
        for number in (0, frames.shape[1], 2 * frames.shape[1] - 1):
            np.testing.assert_array_equal(reader.read_plane(number), volume_to_planes(volume.data, axis)[number])
        rng = np.random.default_rng(axis)
        for _ in range(10):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in frames.shape[1:]]
            a, b, c = (slice(int(start), int(stop)) for start, stop in ends)
            box = (a, b, c)
            np.testing.assert_array_equal(reader.read_box(row, frame, box), frames[1][box])
        with pytest.raises(ValueError, match="no volume number 2"):
            reader.locate_volume(2)


def a_session(
    folder: Path, key: str, contrasts: dict[str, str], *, seed: int = 0
) -> list[tuple[Volume, dict[str, Any]]]:
    """Return the volumes of one session: contrast and dtype of each."""
    found = []
    for number, (contrast, dtype) in enumerate(contrasts.items()):
        volume, meta = a_record(a_scan(folder, f"{key}_{contrast}", dtype=dtype, seed=seed + number))
        found.append((volume, {**meta, "key": key, "subject": key, "contrast": contrast}))
    return found


SESSIONS = {
    "one": {"t1": "int16", "flair": "uint8"},
    "two": {"flair": "float32"},
    "three": {"flair": "int16", "t1": "int16"},
}


@pytest.mark.parametrize("record", ["planes", "blocks", "npy"])
def test_stock_webdataset_reads_each_contrast_of_a_session_as_it_reads_a_record(tmp_path: Path, record: Any) -> None:
    sessions = {key: a_session(tmp_path, key, contrasts) for key, contrasts in SESSIONS.items()}
    entry = write_shard(tmp_path / "shard.tar", [volume for key in sessions for volume in sessions[key]], record=record)
    assert (entry.num_records, entry.num_samples, entry.num_volumes) == (3, 15, 3)
    samples = {sample["__key__"]: sample for sample in stock_samples(tmp_path / "shard.tar")}
    assert list(samples) == list(SESSIONS)
    for key, volumes in sessions.items():
        assert {name for name in samples[key] if name.endswith(record)} == {
            f"{name}.{record}" for name in SESSIONS[key]
        }
        for volume, meta in volumes:
            described = json.loads(samples[key][f"{meta['contrast']}.json"])
            np.testing.assert_array_equal(
                decode_record(samples[key][f"{meta['contrast']}.{record}"], described), volume.data
            )


def test_a_slice_of_a_session_is_read_in_every_contrast(tmp_path: Path) -> None:
    sessions = {key: a_session(tmp_path, key, contrasts) for key, contrasts in SESSIONS.items()}
    write_shard(tmp_path / "shard.tar", [volume for key in sessions for volume in sessions[key]])
    assert index_shard(tmp_path / "shard.tar") == read_index(tmp_path / "shard.idx")
    reader = open_shard(tmp_path / "shard.tar")
    for sample in range(reader.num_samples):
        row, plane = reader.locate(sample)
        volumes = {volume.contrast: volume for volume in reader.volumes(row)}
        assert set(volumes) == set(SESSIONS[row.key])
        for volume, meta in sessions[row.key]:
            found = np.empty(row.stored_shape[2:], volumes[meta["contrast"]].dtype)
            reader.read_located(volumes[meta["contrast"]], plane, found)
            np.testing.assert_array_equal(found, volume_to_planes(volume.data, 2)[plane])


def test_contrasts_of_a_record_must_differ_and_share_one_grid(tmp_path: Path) -> None:
    (first, meta), (second, other) = a_session(tmp_path, "one", {"t1": "int16", "flair": "int16"})
    with pytest.raises(DataError, match="lists a record twice, or a contrast of it: 'one'"):
        write_shard(tmp_path / "shard.tar", [(first, meta), (second, {**other, "contrast": "t1"})])
    coarse, _ = a_record(a_scan(tmp_path, "coarse", shape=(20, 18, 4)))
    with pytest.raises(DataError, match="contrasts of record 'one' are not on one grid"):
        write_shard(tmp_path / "shard.tar", [(first, meta), (coarse, other)])
    third = a_session(tmp_path, "three", {"t1": "int16"})
    with pytest.raises(DataError, match="lists a record twice"):
        write_shard(tmp_path / "shard.tar", [(first, meta), *third, (second, other)])
    with pytest.raises(DataError, match="contrast is a name of a to z, 0 to 9 and _"):
        write_shard(tmp_path / "shard.tar", [(first, {**meta, "contrast": "T1-w"})])


def test_a_record_of_npy_needs_no_decoder_of_p2r(tmp_path: Path) -> None:
    volume, meta = a_record(a_scan(tmp_path, "scan", shape=(9, 8, 4)))
    write_shard(tmp_path / "shard.tar", [(volume, meta)], record="npy")
    (sample,) = webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode()
    np.testing.assert_array_equal(sample["npy"][0], np.moveaxis(volume.data[..., 0], 2, 0))


def test_zstd_is_smaller_than_lz4(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64))[..., None] + np.arange(8)
    nibabel.save(nibabel.Nifti1Image((smooth * 3).astype(np.int16), OBLIQUE), tmp_path / "smooth.nii")
    record = a_record(tmp_path / "smooth.nii")
    assert len(encode_record(*record, codec="zstd")[0]) < len(encode_record(*record, codec="lz4")[0])


def test_equal_records_give_equal_bytes(tmp_path: Path, scans: list[Path]) -> None:
    entries = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        entries.append(write_shard(folder / "shard.tar", map(a_record, scans)))
    assert entries[0] == entries[1]
    for name in ("shard.tar", "shard.idx"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    content = (tmp_path / "first/shard.tar").read_bytes()
    assert entries[0].sha256 == hashlib.sha256(content).hexdigest()
    assert entries[0].num_bytes == len(content)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["shard.idx", "shard.tar"]


def test_the_index_can_be_rebuilt_from_the_tar(tmp_path: Path, scans: list[Path]) -> None:
    write_shard(tmp_path / "shard.tar", map(a_record, scans))
    assert index_shard(tmp_path / "shard.tar") == read_index(tmp_path / "shard.idx")


def test_a_failed_write_leaves_neither_tar_nor_index(tmp_path: Path, scans: list[Path]) -> None:
    def records() -> Any:
        yield a_record(scans[0])
        raise RuntimeError("power cut")

    folder = tmp_path / "shards"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="power cut"):
        write_shard(folder / "shard.tar", records())
    assert list(folder.iterdir()) == []


def test_one_flipped_bit_in_any_plane_is_named(tmp_path: Path, scans: list[Path]) -> None:
    path = tmp_path / "shard.tar"
    write_shard(path, map(a_record, scans))
    rows = read_index(tmp_path / "shard.idx")
    sound = path.read_bytes()
    first = 0
    for row in rows:
        for plane in (0, row.num_planes - 1):
            damaged = bytearray(sound)
            damaged[(row.chunk_offsets[plane] + row.chunk_offsets[plane + 1]) // 2] ^= 4
            path.write_bytes(damaged)
            reader = open_shard(path)
            with pytest.raises(DataError, match=rf"shard\.tar: chunk {plane} of {row.key} is damaged"):
                reader.read_plane(first + plane)
            reader.read_plane(first + (plane + 1) % row.num_planes)  # its neighbour is intact
        first += row.num_planes


def test_a_truncated_shard_is_named(tmp_path: Path, scans: list[Path]) -> None:
    path = tmp_path / "shard.tar"
    write_shard(path, map(a_record, scans))
    rows = read_index(tmp_path / "shard.idx")
    reader = open_shard(path)
    os.truncate(path, rows[-1].offset + 3)  # while it is open
    reader.read_plane(0)
    with pytest.raises(DataError, match="chunk 1 of tiny is damaged"):
        reader.read_plane(reader.num_samples - 1)


def test_a_damaged_record_is_not_decoded(scans: list[Path]) -> None:
    planes, meta = encode_record(*a_record(scans[0]))
    damaged = bytearray(planes)
    damaged[meta["chunk_offsets"][2] + 20] ^= 1
    with pytest.raises(DataError, match="chunk 2 of int16 is damaged"):
        decode_record(bytes(damaged), meta)


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace('"key"', '"kex"'), lambda text: text[:-9], lambda text: "[]\n"]
)
def test_a_damaged_index_is_refused(tmp_path: Path, scans: list[Path], damage: Any) -> None:
    entry = write_shard(tmp_path / "shard.tar", map(a_record, scans))
    index = tmp_path / "shard.idx"
    index.write_text(damage(index.read_text()))
    with pytest.raises(DataError, match="the index is damaged"):
        read_index(index, sha256=entry.index_sha256)
    with pytest.raises(DataError, match=r"line \d: the index cannot be parsed|line 5 is not JSON"):
        read_index(index)


HOSTILE_ROWS: dict[str, dict[str, Any]] = {
    "negative offset": {"offset": -1},
    "a fraction": {"shape": [20, 18, 5, 1.5]},
    "more than memory": {"shape": [1 << 20, 1 << 20, 5, 1], "chunk_shape": [1, 1 << 20, 1 << 20]},
    "no axis": {"slice_axis": 3},
    "objects": {"dtype": "|O"},
    "big-endian": {"dtype": ">i2"},
    "chunks that go back": {"chunk_offsets": [9, 3, 9, 9, 9, 9]},
    "chunks elsewhere": {"chunk_offsets": [0, 0, 0, 0, 0, 1 << 40]},
    "too few checksums": {"chunk_crc32": [0]},
    "no chunk": {"chunk_shape": [0, 18, 5]},
    "spacing": {"spacing_mm": [1.0, float("nan"), 1.0]},
    "spacing of 100 m": {"spacing_mm": [1.0, 1e5, 1.0]},
    "spacing beyond numbers": {"spacing_mm": [1.0, 1e300, 1.0]},
    "no spacing": {"spacing_mm": [1.0, 0.0, 1.0]},
    "a scan of 15 m": {"spacing_mm": [1.0, 840.0, 1.0]},
    "percentiles": {"percentiles": [1.0]},
    "percentiles beyond 32 bits": {"percentiles": [1e308] * 17},
    "percentiles that span more than 32 bits": {"percentiles": [-2e38, *[0.0] * 15, 2e38]},
    "percentiles that fall": {"percentiles": list(range(17, 0, -1))},
    "percentiles that are equal": {"percentiles": [3.0] * 17},
    "percentiles closer than 32 bits tell": {"percentiles": [1e-60 * number for number in range(17)]},
    "a count of 2**60": {"shape": [20, 18, 5, 1 << 60]},
    "a plane of 2**60": {"shape": [20, 1 << 60, 5, 1]},
    "an offset of 2**60": {"offset": 1 << 60},
    "an offset of 70 bits": {"offset": 1 << 70},
    "a long key": {"key": "k" * 2000},
    "true for an axis": {"slice_axis": True},
    "key": {"key": ["a"]},
    "beyond the tar": {"size": 1 << 50},
    "an unknown key": {"more": 1},
    "nothing": {"shape": None},
}


@pytest.mark.parametrize("change", HOSTILE_ROWS.values(), ids=HOSTILE_ROWS)
def test_a_hostile_index_is_refused_before_anything_is_read(tmp_path: Path, change: dict[str, Any]) -> None:
    write_shard(tmp_path / "shard.tar", [a_record(a_scan(tmp_path, "scan"))])
    index = tmp_path / "shard.idx"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}) + "\n")
    with pytest.raises(DataError, match=r"breaks a rule|cannot be parsed|is not JSON"):
        open_shard(tmp_path / "shard.tar")


def test_a_chunk_of_another_decoded_size_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.tar", [a_record(a_scan(tmp_path, "scan"))])
    index = tmp_path / "shard.idx"
    row = json.loads(index.read_text())
    row["shape"][0] *= 2
    row["chunk_shape"][1] *= 2
    index.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="does not decode to its shape"):
        open_shard(tmp_path / "shard.tar").read_plane(0)


def a_tar(path: Path, members: list[tuple[str, bytes, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("../../evil.json", b"{}", tarfile.REGTYPE)],
        [("a.json", b"", tarfile.SYMTYPE)],
        [("a.json", b"", tarfile.LNKTYPE)],
        [("a.planes", b"x", tarfile.REGTYPE)],
        [("a.json", b"{}", tarfile.REGTYPE), ("b.planes", b"x", tarfile.REGTYPE)],
        [("a.json", b"{}", tarfile.REGTYPE)],
        [("a.json", b"[" * 100_000, tarfile.REGTYPE), ("a.planes", b"x", tarfile.REGTYPE)],
        [("a.json", b"null", tarfile.REGTYPE), ("a.planes", b"x", tarfile.REGTYPE)],
    ],
)
def test_a_tar_that_is_not_a_shard_is_refused(tmp_path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    with pytest.raises(DataError, match="not a shard, or damaged"):
        index_shard(a_tar(tmp_path / "shard.tar", members))


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_every_damaged_tar_or_index_raises_a_data_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        folder.mkdir()
        write_shard(folder / "sound.tar", [a_record(a_scan(folder, name)) for name in ("a", "b")])
    suffix = data.draw(st.sampled_from([".tar", ".idx"]))
    content = bytearray((folder / f"sound{suffix}").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    for other in (".tar", ".idx"):
        sound = (folder / f"sound{other}").read_bytes()
        (folder / f"damaged{other}").write_bytes(content if other == suffix else sound)
    with contextlib.suppress(DataError):
        index_shard(folder / "damaged.tar")
    with contextlib.suppress(DataError):
        reader, sound_reader = open_shard(folder / "damaged.tar"), open_shard(folder / "sound.tar")
        for sample in range(reader.num_samples):
            plane = reader.read_plane(sample)
            if suffix == ".tar":  # values that are returned equal the written ones
                np.testing.assert_array_equal(plane, sound_reader.read_plane(sample))


def test_a_key_that_webdataset_would_cut_is_refused(tmp_path: Path, scans: list[Path]) -> None:
    volume, meta = a_record(scans[0])
    with pytest.raises(ValueError, match="letters, digits"):
        write_shard(tmp_path / "shard.tar", [(volume, {**meta, "key": "sub-01.v2"})])


def test_a_key_longer_than_a_plain_tar_name_is_kept(tmp_path: Path, scans: list[Path]) -> None:
    volume, meta = a_record(scans[0])
    key = "sub-01_" + "x" * 200
    write_shard(tmp_path / "shard.tar", [(volume, {**meta, "key": key})])
    (sample,) = stock_samples(tmp_path / "shard.tar")
    assert sample["__key__"] == key
    reader = open_shard(tmp_path / "shard.tar")
    np.testing.assert_array_equal(reader.read_plane(3), volume.data[:, :, 3, 0])


def test_members_have_no_owner_and_no_time(tmp_path: Path, scans: list[Path]) -> None:
    write_shard(tmp_path / "shard.tar", map(a_record, scans))
    with tarfile.open(tmp_path / "shard.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "bigdata")}
    assert str(tmp_path).encode() not in (tmp_path / "shard.tar").read_bytes()


def test_the_digest_of_voxels_does_not_depend_on_compression_header_or_dtype(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 900, (8, 9, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, OBLIQUE), tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), OBLIQUE), tmp_path / "b.nii")
    nibabel.save(nibabel.Nifti1Image(voxels[:, :, ::-1], OBLIQUE), tmp_path / "c.nii")
    a, b, c = (voxels_sha256(read_volume(tmp_path / name)) for name in ("a.nii.gz", "b.nii", "c.nii"))
    assert a == b != c
