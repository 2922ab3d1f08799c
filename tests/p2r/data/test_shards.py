import hashlib
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

from p2r.data.preprocess import volume_to_planes
from p2r.data.shards import (
    ShardReader,
    decode_record,
    encode_record,
    index_shard,
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
        "window": [0.0, 200.0],
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
def test_stock_webdataset_and_five_plain_lines_give_the_voxels_of_nibabel(
    tmp_path: Path, scans: list[Path], axis: int
) -> None:
    write_shard(tmp_path / "shard.tar", [a_record(path, axis=axis) for path in scans])
    samples = stock_samples(tmp_path / "shard.tar")
    assert [sample["__key__"] for sample in samples] == list(SCANS)
    for sample, path in zip(samples, scans, strict=True):
        meta, raw = json.loads(sample["json"]), sample["planes"]
        ends = meta["plane_offsets"]
        planes = [np.frombuffer(blosc2.decompress2(raw[a:b]), meta["dtype"]) for a, b in pairwise(ends)]
        axis, frames = meta["slice_axis"], meta["shape"][3]
        sides = [n for i, n in enumerate(meta["shape"][:3]) if i != axis]
        voxels = np.moveaxis(np.reshape(planes, (frames, -1, *sides)), (0, 1), (3, axis))

        canonical = nibabel.as_closest_canonical(nibabel.load(path))
        expected = np.asarray(canonical.dataobj).reshape(voxels.shape)
        assert voxels.dtype == expected.dtype.newbyteorder("<")
        np.testing.assert_array_equal(voxels, expected)
        np.testing.assert_allclose(meta["affine"], canonical.affine)
        np.testing.assert_allclose(meta["source_affine"], OBLIQUE, rtol=1e-6)
        np.testing.assert_array_equal(decode_record(raw, meta), expected)


def test_every_plane_comes_back_by_its_number(tmp_path: Path, scans: list[Path]) -> None:
    records = [a_record(path, axis=axis % 3) for axis, path in enumerate(scans)]
    entry = write_shard(tmp_path / "shard.tar", records)
    reader = ShardReader(tmp_path / "shard.tar", read_index(tmp_path / "shard.idx", sha256=entry["index_sha256"]))
    planes = [plane for volume, meta in records for plane in volume_to_planes(volume.data, meta["slice_axis"])]
    assert reader.num_samples == entry["num_samples"] == len(planes)
    assert entry["num_records"] == len(scans)
    for number, plane in enumerate(planes):
        found = reader.read_plane(number)
        assert found.dtype == plane.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, plane)
    with pytest.raises(ValueError, match="samples, asked for number"):
        reader.read_plane(len(planes))


def test_equal_records_give_equal_bytes(tmp_path: Path, scans: list[Path]) -> None:
    entries = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        entries.append(write_shard(folder / "shard.tar", map(a_record, scans)))
    assert entries[0] == entries[1]
    for name in ("shard.tar", "shard.idx"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    content = (tmp_path / "first/shard.tar").read_bytes()
    assert entries[0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert entries[0]["num_bytes"] == len(content)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["shard.idx", "shard.tar"]


def test_the_index_can_be_made_again_from_the_tar_alone(tmp_path: Path, scans: list[Path]) -> None:
    write_shard(tmp_path / "shard.tar", map(a_record, scans))
    assert index_shard(tmp_path / "shard.tar") == read_index(tmp_path / "shard.idx")


def test_a_failure_half_way_leaves_neither_tar_nor_index(tmp_path: Path, scans: list[Path]) -> None:
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
            damaged[(row.plane_offsets[plane] + row.plane_offsets[plane + 1]) // 2] ^= 4
            path.write_bytes(damaged)
            reader = ShardReader(path, rows)
            with pytest.raises(DataError, match=rf"shard\.tar: plane {plane} of {row.key} is damaged"):
                reader.read_plane(first + plane)
            reader.read_plane(first + (plane + 1) % row.num_planes)  # its neighbour is sound
        first += row.num_planes


def test_a_shard_that_was_cut_is_named(tmp_path: Path, scans: list[Path]) -> None:
    path = tmp_path / "shard.tar"
    write_shard(path, map(a_record, scans))
    rows = read_index(tmp_path / "shard.idx")
    os.truncate(path, rows[-1].offset + 3)
    reader = ShardReader(path, rows)
    reader.read_plane(0)
    with pytest.raises(DataError, match="plane 1 of tiny is damaged"):
        reader.read_plane(reader.num_samples - 1)


def test_a_damaged_record_is_not_decoded(scans: list[Path]) -> None:
    planes, meta = encode_record(*a_record(scans[0]))
    damaged = bytearray(planes)
    damaged[meta["plane_offsets"][2] + 20] ^= 1
    with pytest.raises(DataError, match="record int16: plane 2 is damaged"):
        decode_record(bytes(damaged), meta)


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace('"key"', '"kex"'), lambda text: text[:-9], lambda text: "[]\n"]
)
def test_a_damaged_index_is_refused(tmp_path: Path, scans: list[Path], damage: Any) -> None:
    entry = write_shard(tmp_path / "shard.tar", map(a_record, scans))
    index = tmp_path / "shard.idx"
    index.write_text(damage(index.read_text()))
    with pytest.raises(DataError, match="the index is damaged"):
        read_index(index, sha256=entry["index_sha256"])
    with pytest.raises(DataError, match="the index cannot be parsed"):
        read_index(index)


def test_a_key_that_webdataset_would_cut_is_refused(tmp_path: Path, scans: list[Path]) -> None:
    volume, meta = a_record(scans[0])
    with pytest.raises(ValueError, match="letters, digits"):
        write_shard(tmp_path / "shard.tar", [(volume, {**meta, "key": "sub-01.v2"})])


def test_a_key_longer_than_a_plain_tar_name_survives(tmp_path: Path, scans: list[Path]) -> None:
    volume, meta = a_record(scans[0])
    key = "sub-01_" + "x" * 200
    write_shard(tmp_path / "shard.tar", [(volume, {**meta, "key": key})])
    (sample,) = stock_samples(tmp_path / "shard.tar")
    assert sample["__key__"] == key
    reader = ShardReader(tmp_path / "shard.tar", read_index(tmp_path / "shard.idx"))
    np.testing.assert_array_equal(reader.read_plane(3), volume.data[:, :, 3, 0])


def test_members_carry_no_trace_of_who_wrote_them_and_when(tmp_path: Path, scans: list[Path]) -> None:
    write_shard(tmp_path / "shard.tar", map(a_record, scans))
    with tarfile.open(tmp_path / "shard.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "bigdata")}
    assert str(tmp_path).encode() not in (tmp_path / "shard.tar").read_bytes()


def test_the_digest_of_voxels_does_not_see_zipping_header_or_dtype(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 900, (8, 9, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, OBLIQUE), tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), OBLIQUE), tmp_path / "b.nii")
    nibabel.save(nibabel.Nifti1Image(voxels[:, :, ::-1], OBLIQUE), tmp_path / "c.nii")
    a, b, c = (voxels_sha256(read_volume(tmp_path / name)) for name in ("a.nii.gz", "b.nii", "c.nii"))
    assert a == b != c
