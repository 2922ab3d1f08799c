"""Results of many scans: which are there already, also of scans in a bucket."""

from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from cluster.outputs import Result, Target, list_targets, process_each, rows_of_earlier_calls
from p2r.data.opening import remote_version
from p2r.errors import InputError, StorageError
from p2r.files import file_sha256


def write(target: Target) -> Result:
    target.path.write_text("labels")
    return Result("one class", [[target.title, 1]])


@pytest.mark.parametrize("place", ["folder", "file-url", "bucket"])
@pytest.mark.parametrize("has_contrasts", [False, True])
def test_a_scan_that_has_changed_is_processed_again_wherever_it_is(
    place: str, has_contrasts: bool, s3_url: str, tmp_path: Path
) -> None:
    where = {"folder": str(tmp_path / "scans"), "file-url": f"file://{tmp_path}/scans", "bucket": s3_url}[place]
    scans = [f"{where}/sub-{number}.nii.gz" for number in range(2)]
    out = tmp_path / "out"
    out.mkdir()
    targets = [
        Target(scan, out / f"{number}.nii.gz", key=str(number), contrasts=(("t1", scan),))
        if has_contrasts
        else Target(scan, out / f"{number}.nii.gz")
        for number, scan in enumerate(scans)
    ]

    def told() -> list[bool]:
        """Process both; return whether each was there already."""
        lines: list[str] = []
        process_each(targets, write, out, inputs={"model": "m"}, say=lines.append)
        return ["there already" in line for line in lines]

    for scan in scans:
        put(scan, b"content")
    assert told() == [False, False]
    assert told() == [True, True]
    put(scans[1], b"another")  # of the same length
    assert told() == [True, False]
    remove(scans[1])
    lines: list[str] = []
    if place == "bucket":
        process_each(targets, write, out, inputs={"model": "m"}, say=lines.append)
        assert "there already" in lines[0] and "there is no such object" in lines[1]
        remove(scans[0])
        with pytest.raises(InputError, match="none of the 2 scans could be used"):
            process_each(targets, write, out, inputs={"model": "m"}, say=lines.append)


@pytest.mark.parametrize(
    ("scans", "results"),
    [
        (["../x/a.nii.gz", "b.nii.gz"], ["x/a.nii.gz", "work/b.nii.gz"]),
        (["c/../../x/a.nii.gz", "../../y/b.nii.gz"], ["here/x/a.nii.gz", "y/b.nii.gz"]),
        (["c/a.nii.gz", "c/../c/d/b.nii.gz", "c/../a.nii.gz"], ["c/a.nii.gz", "c/d/b.nii.gz", "a.nii.gz"]),
    ],
)
def test_results_of_scans_with_dots_in_their_paths_stay_below_the_output(
    scans: list[str], results: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/work/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/work")
    assert [target.path for target in list_targets(scans, "out")] == [Path("out", result) for result in results]


@pytest.mark.parametrize("state", [{}, {"Last-Modified": "Mon"}])
def test_the_version_of_a_web_file_is_its_date_or_unknown(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, str]
) -> None:
    web = SimpleNamespace(info=lambda url: {"size": 4, "type": "file"} | state)
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (web, url))
    first, second = (remote_version("http://server/scan.nii.gz") for _ in range(2))
    assert (first == second) == bool(state)
    state["Last-Modified"] = "Tue"
    assert remote_version("http://server/scan.nii.gz") != first


def test_a_web_server_that_cannot_be_reached_is_not_an_absent_scan() -> None:
    with pytest.raises(StorageError, match=r"cannot read http://127.* ClientConnectorError"):
        remote_version("http://127.0.0.1:9/scan.nii.gz")


def test_a_scan_in_two_files_is_processed_again_if_either_has_changed(tmp_path: Path) -> None:
    for name in ("a.hdr", "a.img"):
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "out").mkdir()
    lines: list[str] = []
    for changed in ("", "a.img", "a.hdr", ""):
        if changed:
            (tmp_path / changed).write_bytes(b"another")
        target = Target(str(tmp_path / "a.hdr"), tmp_path / "out/a.nii.gz")
        process_each([target], write, tmp_path / "out", inputs={}, say=lines.append)
    assert ["there already" in line for line in lines] == [False, False, False, True]


def test_the_table_keeps_rows_of_other_whole_results_with_the_same_inputs(tmp_path: Path) -> None:
    scans = [str(tmp_path / f"{letter}.nii.gz") for letter in "abcd"]
    out = tmp_path / "out"
    out.mkdir()
    targets = [Target(scan, out / f"{Path(scan).name}") for scan in scans]
    inputs, others = {"model": "m"}, {"model": "another"}
    for scan in scans:
        put(scan, b"content")
    process_each([targets[0]], write, out, inputs=others, say=print)
    process_each(targets[1:], write, out, inputs=inputs, say=print)

    def rows(now: list[Target]) -> list[list[str | int | float]]:
        return rows_of_earlier_calls(now, out, inputs=inputs)

    assert rows(targets) == []
    assert rows(targets[:2]) == [[scans[2], 1], [scans[3], 1]]
    targets[2].path.write_text("edited")
    assert rows(targets[:2]) == [[scans[3], 1]]
    targets[3].path.unlink()
    assert rows(targets[:1]) == [[scans[1], 1]]
    assert rows([targets[1]._replace(path=out / "b.zarr")]) == [], "the same scan in another form"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_scan_that_cannot_be_read_is_refused_and_the_others_are_processed(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [Target(str(tmp_path / name), tmp_path / "out" / name) for name in ("a.nii.gz", "b.nii.gz")]
    (tmp_path / "out").mkdir()
    for target in targets:
        put(target.scan, b"content")

    def digest(path: Path) -> str:
        if str(path) == targets[0].scan:
            raise error
        return file_sha256(path)

    monkeypatch.setattr("cluster.outputs.file_sha256", digest)
    lines: list[str] = []
    assert len(process_each(targets, write, tmp_path / "out", inputs={}, say=lines.append)) == 1
    assert f"refused: cannot read {targets[0].scan}: {type(error).__name__}" in lines[0] and "[unreadable]" in lines[0]
    assert targets[1].path.exists() and not targets[0].path.exists()


def put(scan: str, content: bytes) -> None:
    """Write a file of a folder or bucket."""
    files, path = fsspec.url_to_fs(scan, skip_instance_cache=True)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, content)


def remove(scan: str) -> None:
    """Remove a file of a folder or bucket."""
    files, path = fsspec.url_to_fs(scan, skip_instance_cache=True)
    files.rm_file(path)
