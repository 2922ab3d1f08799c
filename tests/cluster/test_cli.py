import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cluster import cli, submit_hook

Call = Callable[..., str]


@pytest.fixture
def p2r(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the `p2r` command in this process and return what it printed to stdout; raise SystemExit for other codes than 0."""

    def call(*arguments: str | Path) -> str:
        if code := cli.main([*map(str, arguments)]):
            raise SystemExit(code)
        return capsys.readouterr().out

    return call


@pytest.fixture
def oblique_scan(toy_data: Path, tmp_path: Path) -> Path:
    """A toy scan turned by 20 degrees about two axes, with its axes in another order, as scanners leave them."""
    image = nibabel.load(toy_data / "images/sub-07_T1w.nii.gz")
    turn = np.eye(4)
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    turn[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    swapped = image.as_reoriented([[2, 1], [0, -1], [1, 1]])
    path = tmp_path / "oblique.nii.gz"
    nibabel.Nifti1Image(np.asarray(swapped.dataobj), turn @ swapped.affine).to_filename(path)
    return path


def test_predict_puts_the_segmentation_on_the_scan_s_own_grid(
    p2r: Call, published: dict[str, str], oblique_scan: Path, toy_data: Path, tmp_path: Path
) -> None:
    printed = p2r("predict", published["model"], oblique_scan, "-o", tmp_path / "seg.nii.gz")
    scan, found = nibabel.load(oblique_scan), nibabel.load(tmp_path / "seg.nii.gz")
    assert found.shape == scan.shape
    assert np.allclose(found.affine, scan.affine, atol=1e-5)
    assert "1 DISC:" in printed
    # The disc is bright in the scan: it must be bright under the segmentation too, or the grid is wrong.
    voxels, labels = np.asarray(scan.dataobj), np.asarray(found.dataobj)
    assert set(np.unique(labels)) == {0, 1}
    assert voxels[labels == 1].mean() > 2 * voxels[labels == 0].mean()


def test_predict_keeps_units_and_time_and_prints_the_volumes_of_each_frame(
    p2r: Call, published: dict[str, str], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voxels = np.asarray(nibabel.load(toy_data / "images/sub-07_T1w.nii.gz").dataobj)
    series = nibabel.Nifti1Image(np.stack([voxels, voxels[::-1], voxels], -1), np.diag([2000.0, 2000, 8000, 1]))
    series.set_qform(None)
    series.header.set_xyzt_units("micron", "msec")
    series.header.set_zooms((2000, 2000, 8000, 40))
    for image, name in ((series, "series"), (series.slicer[:, :, 1:2, 0], "plane")):
        image.to_filename(tmp_path / f"{name}.nii.gz")
        printed = p2r("predict", published["model"], tmp_path / f"{name}.nii.gz", "-o", tmp_path / f"{name}_seg.nii")
        found = nibabel.load(tmp_path / f"{name}_seg.nii")
        assert found.shape == image.shape
        assert found.header.get_zooms() == image.header.get_zooms()
        assert found.header.get_xyzt_units() == ("micron", "msec")
        assert (found.header["sform_code"], found.header["qform_code"]) == (2, 0)
        labels = np.asarray(found.dataobj).reshape(-1, 3 if name == "series" else 1, order="F")
        in_ml = [float(number) for number in re.findall(r"[\d.]+", printed.split("DISC:")[1].split("ml")[0])]
        assert in_ml == pytest.approx(labels.sum(0) * 0.032, abs=0.06)
        assert min(in_ml) > 0
        assert ("in frames 1 to 3" in printed) == (name == "series")
    with pytest.raises(SystemExit):
        p2r("predict", published["model"], tmp_path / "plane.nii.gz", "-o", "s3://bucket/seg.nii.gz")
    assert "written to a folder of this machine" in capsys.readouterr().err


def test_compare_takes_a_published_backbone_by_its_rows(p2r: Call, published: dict[str, str], tmp_path: Path) -> None:
    report = Path(published["storage"].removeprefix("file://")) / "report/report.json"
    shutil.copy(report, tmp_path)
    printed = p2r("compare", published["backbone"], tmp_path, "-o", tmp_path / "out")
    assert printed.startswith(f"A  toy {published['backbone']} ") and "note:" not in printed
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    modes = {row["mode"] for row in json.loads(report.read_text())["rows"]}
    assert {one["mode"] for one in comparison["differences"]} == modes
    assert {one["difference"] for one in comparison["differences"]} == {0.0}


def test_views_draws_the_transforms_of_a_job_on_a_scan(
    p2r: Call, write_toy_job: Callable[..., Path], toy_data: Path, tmp_path: Path
) -> None:
    job, scan, sheet = write_toy_job(tmp_path), toy_data / "images/sub-07_T1w.nii.gz", tmp_path / "views.png"
    printed = p2r("views", job, "--scan", scan, "-o", sheet, "--set", "pretrain.views=pix2rep")
    assert printed.strip() == str(sheet)
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_embed_writes_features_in_the_scan_s_world(
    p2r: Call, published: dict[str, str], oblique_scan: Path, tmp_path: Path
) -> None:
    p2r("embed", published["backbone"], oblique_scan, "-o", tmp_path / "features.nii.gz")
    scan, features = nibabel.load(oblique_scan), nibabel.load(tmp_path / "features.nii.gz")
    assert features.ndim == 4
    assert features.shape[3] == 4
    assert features.get_data_dtype() == np.float32

    def centre(image: nibabel.Nifti1Image) -> np.ndarray:
        return np.asarray(image.affine @ [*((np.array(image.shape[:3]) - 1) / 2), 1])

    assert np.allclose(centre(scan), centre(features), atol=1e-3)


def test_validate_names_what_is_missing_in_the_environment(
    p2r: Call, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("P2R_DATA", raising=False)
    printed = p2r("validate", *sorted((repository / "jobs").glob("*.yaml")))
    assert printed.count("valid ") == len(list((repository / "jobs").glob("*.yaml")))
    assert "acdc-small  needs P2R_DATA" in printed


def test_schema_is_json(p2r: Call) -> None:
    assert json.loads(p2r("schema"))["title"] == "p2r job"


def test_inspect_lists_what_lies_at_a_url(p2r: Call, published: dict[str, str]) -> None:
    printed = p2r("inspect", published["storage"])
    for kind in ("p2r-corpus/2", "p2r-backbone/2", "p2r-model/2", "p2r-checkpoint/1"):
        assert kind in printed
    manifest = json.loads(p2r("inspect", published["backbone"], "--json"))
    assert manifest["licence"] == "CC0-1.0"
    assert "subject_digests" not in manifest["corpora"][0]


def test_inspect_shows_a_corpus_as_a_table_or_as_json(p2r: Call, published: dict[str, str]) -> None:
    printed = p2r("inspect", published["corpus"])
    for word in ("CC0-1.0", "accepted", "spacing, mm", "revision", "int16", "15"):
        assert word in printed
    manifest = json.loads(p2r("inspect", published["corpus"], "--json"))
    assert (manifest["num_records"], manifest["num_samples"], manifest["revision"]) == (5, 15, 1)
    assert "subject_digests" not in manifest


def test_what_a_manifest_says_cannot_command_the_terminal(p2r: Call, published: dict[str, str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published["corpus"].removeprefix("file://"), tmp_path / "corpus"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "licence": "[/bold] \x1b[2J mine"}))
    printed = p2r("inspect", copy)
    assert "[/bold] ?[2J mine" in printed and "\x1b" not in printed


def test_verify_names_files_of_no_revision(p2r: Call, published: dict[str, str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published["corpus"].removeprefix("file://"), tmp_path / "corpus"))
    (copy / "shard-000099-000000000000.tar").write_bytes(b"")
    printed = p2r("verify", copy)
    assert "unreferenced  shard-000099-000000000000.tar" in printed and "sound" in printed


@pytest.mark.parametrize("name", ["corpus", "backbone", "model"])
def test_verify_reads_every_digest(p2r: Call, published: dict[str, str], tmp_path: Path, name: str) -> None:
    """One flipped bit in the middle of any file is found; `verify` says which file it does not check."""
    copy = Path(shutil.copytree(published[name].removeprefix("file://"), tmp_path / name))
    printed = p2r("verify", copy)
    assert "sound" in printed and "unreferenced" not in printed
    (pin,) = re.findall(r"^pin +(\S+)$", printed, re.MULTILINE)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and not {"receipts", "report"} & {*path.parts}]
    kinds = {path.suffix for path in files}
    assert kinds >= ({".tar", ".idx", ".jsonl"} if name == "corpus" else {".safetensors", ".json", ".md"})
    unchecked = set(re.findall(r"^unchecked +([^:\s]+):", printed, re.MULTILINE))
    assert unchecked <= {"results.json"}
    for path in (path for path in files if path.name not in unchecked):
        content = path.read_bytes()
        path.write_bytes(flipped(content))
        with pytest.raises(SystemExit) as refusal:
            p2r("verify", pin if path.name == "manifest.json" else copy)
        assert refusal.value.code in (1, 2), path.name
        path.write_bytes(content)
    assert "sound" in p2r("verify", pin)


def flipped(content: bytes) -> bytes:
    """Flip one bit in the middle; of text, one that keeps it text."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_status_reads_the_storage_alone(
    p2r: Call, published: dict[str, str], write_toy_job: Callable[..., Path]
) -> None:
    job = write_toy_job(Path(published["storage"].removeprefix("file://")).parent)
    printed = p2r("status", job)
    assert "step 6/6" in printed
    assert "0 search and 6 final trials done" in printed  # one candidate needs no search


def test_plan_takes_rate_and_corpus_from_the_job_s_own_storage(
    p2r: Call, published: dict[str, str], write_toy_job: Callable[..., Path]
) -> None:
    job = write_toy_job(Path(published["storage"].removeprefix("file://")).parent)
    found = json.loads(p2r("plan", job, "--workers-per-node", "2", "--cost-per-hour", "3", "--json"))
    assert (found["num_workers"], found["images_in_corpus"], found["steps_per_epoch"]) == (2, 15, 3)
    assert found["pace"]["source"] == f"median of 3 reports in {published['storage']}/pretrain/history.jsonl"
    assert found["pace"]["epoch_cost"] == pytest.approx(found["pace"]["epoch_hours"] * 2 * 3)
    assert found["world_sizes"] == [1, 2, 4]
    assert found["peak_bytes"] == max(moment["total"] for moment in found["memory_bytes"].values())
    printed = p2r("plan", job, "--images-per-s-per-worker", "50", "--device", "cuda")
    for words in ("1 on cuda: 1 node of 1", "0 B: gradients 0 B", "50.0 img/s", "allowed workers", "1, 2, 4"):
        assert words in printed
    if find_spec("triton") is not None:  # fp32 has no kernels
        assert "slow, and its time is unknown: the loss has no kernels" in " ".join(printed.split())


def test_plan_refuses_what_cannot_fit(
    p2r: Call, write_toy_job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_toy_job(tmp_path)
    with pytest.raises(SystemExit) as stop:
        p2r("plan", job, "--memory-gib", "0.01")
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "does not fit" in out and "speed" in out  # the table comes first
    assert "plan | no epochs: " in err
    assert "p2r: a worker would hold" in err and "set pretrain.micro_batch=2" in err


def test_the_hook_adds_the_working_directory(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.chdir(repository)
    monkeypatch.setattr("cluster.submit_hook.os.execv", lambda program, arguments: called.append(arguments))
    monkeypatch.setattr(sys, "argv", ["ray", "job", "submit", "--no-wait", "jobs/pretrain.yaml"])
    submit_hook.default_working_dir(working_dir=None, entrypoint=("jobs/pretrain.yaml",), address=None)
    expected = ["ray", "job", "submit", "--working-dir", ".", "--no-wait", "jobs/pretrain.yaml"]
    assert called == [[sys.executable, *expected]]


@pytest.mark.parametrize(
    ("working_dir", "entrypoint"),
    [("x", ("jobs/pretrain.yaml",)), (None, ("python", "-c", "1")), (None, ("jobs/absent.yaml",)), (None, ())],
)
def test_the_hook_leaves_other_submissions_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, working_dir: str | None, entrypoint: tuple[str, ...]
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr("cluster.submit_hook.os.execv", lambda *_: pytest.fail("it submitted again"))
    submit_hook.default_working_dir(working_dir=working_dir, entrypoint=entrypoint)


CORE_ONLY = """
import sys
for name in {names!r}:
    sys.modules[name] = None  # as if it were not installed
"""


@pytest.fixture
def in_core(repository: Path, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run Python code where nothing that only the extra `cluster` brings can be imported."""
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [re.split(r"[\[<>=;]", line)[0].replace("-", "_") for line in extras["cluster"]]
    assert {"ray", "deepspeed", "webdataset"} < set(names)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CORE_ONLY.format(names=names) + code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run


Core = Callable[[str], subprocess.CompletedProcess[str]]


def test_a_core_installation_loads_a_backbone_prepares_a_scan_and_predicts(
    in_core: Core, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    scan = toy_data / "images/sub-07_T1w.nii.gz"
    done = in_core(
        f"""
import p2r
backbone = p2r.load_backbone({published["backbone"]!r})
print(backbone(backbone.prepare({str(scan)!r}).images).shape[1])
sys.argv = ["p2r", "predict", {published["model"]!r}, {str(scan)!r}, "-o", "segmentation.nii.gz"]
from cluster.cli import main
assert main() == 0
sys.argv = ["p2r", "verify", {published["backbone"]!r}]
assert main() == 0
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4\n") and "sound    p2r-backbone/" in done.stdout
    assert (tmp_path / "segmentation.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["run", "demo"], "ray"), (["compare", "{storage}"], "matplotlib"), (["verify", "{corpus}"], "blosc2")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_more_than_the_core_says_what_to_install(
    in_core: Core, published: dict[str, str], arguments: list[str], package: str
) -> None:
    words = ["p2r", *(word.format(**published) for word in arguments)]
    done = in_core(f"sys.argv = {words!r}\nfrom cluster.cli import main\nsys.exit(main())\n")
    assert done.returncode == 2
    assert f"needs the package {package}" in done.stderr and "install p2r again with its extra 'cluster'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_published_is_signed_and_verified_by_its_key(
    p2r: Call, published: dict[str, str], tmp_path: Path, write_toy_job: Callable[..., Path]
) -> None:
    folder = Path(published["storage"].removeprefix("file://"))
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    shutil.copytree(folder, tmp_path / "storage")
    job, key = write_toy_job(tmp_path), Ed25519PrivateKey.generate()
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    name = f"ed25519:{key.public_key().public_bytes_raw().hex()}"
    shutil.rmtree(tmp_path / "storage/backbones")
    printed = p2r("publish", job, "--sign", private)
    pin = next(line.split(": ", 1)[1] for line in printed.splitlines() if line.startswith("backbone_pin: "))
    assert pin.startswith(f"file://{tmp_path}/storage/backbones/toy/1@sha256:") and f"signed: {name}" in printed
    for given in (public, name):
        printed = p2r("verify", pin, "--key", given)
        assert f"pin      {pin}" in printed and f"signed   {name}" in printed
    assert "unchecked  manifest.sig" in p2r("verify", pin)
    model = tmp_path / "storage/models/disc/all"
    assert p2r("sign", model, "--key", private).strip() == f"signed: {name}"
    assert f"signed   {name}" in p2r("verify", model, "--key", public)
