import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p2r.backbone import load_backbone, load_model
from p2r.data.volume import read_volume
from p2r.errors import InputError
from p2r.evaluate.models import load_model as load_predictor
from p2r.export import export

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")
Publish = Callable[..., str]


@pytest.mark.parametrize(
    ("name", "dimensions", "kind", "settings"),
    [("unet", 2, "model", {"level": 1}), ("dynunet", 3, "backbone", {})],
)
def test_an_onnx_file_gives_the_outputs_of_p2r_for_any_batch_and_size(
    publish_toy: Publish,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dimensions: int,
    kind: str,
    settings: dict[str, Any],
) -> None:
    url = publish_toy(name, dimensions=dimensions, kind=kind, **settings)
    export(url, to="onnx", folder=tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    facts = json.loads((tmp_path / "onnx" / "preparation.json").read_text())
    own: Any = load_backbone(url).network if kind == "backbone" else load_model(url)[0]
    side = facts["input"]["smallest_side"]
    for batch, last in ((1, side), (2, side + facts["input"]["sides_divisible_by"])):
        image = torch.rand(batch, 1, *[side] * (dimensions - 1), last)
        (found,) = session.run([facts["output"]["name"]], {"image": image.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), own(image), rtol=1e-4, atol=1e-4)
    assert facts["preparation"]["spacing_mm"] == 2.0
    assert len(facts["output"]["channels"]) == found.shape[1]
    if kind == "model":
        _check_guide(url, next((toy_data / "images").glob("*.nii.gz")), tmp_path / "onnx", monkeypatch)


def _check_guide(url: str, scan: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the guide's code on a whole scan in the exported folder, and compare its probabilities with p2r."""
    guide = (Path(__file__).parents[3] / "docs/how-to/export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide.partition("## ONNX")[2].partition("\n## ")[0], re.DOTALL)
    shutil.copyfile(scan, folder / "scan.nii.gz")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "pixels", raising=False)
    values: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of readers that are not used here
        exec(code, values)
    monkeypatch.delitem(sys.modules, "pixels")
    wanted = load_predictor(url).probabilities(read_volume(scan))[..., 0, :]
    torch.testing.assert_close(
        torch.as_tensor(values["maps"][0]).movedim(0, -1), torch.from_numpy(wanted), rtol=1e-4, atol=1e-4
    )


def test_without_its_package_the_extra_is_named(
    publish_toy: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "p2r.export.onnx_file", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"needs the package onnx, .* install p2r again with its extra 'onnx'"):
        export(publish_toy("unet"), to="onnx", folder=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_file_that_the_runtime_cannot_read_is_refused_by_name(publish_toy: Publish, tmp_path: Path) -> None:
    from p2r.export.onnx_file import _open_session
    from p2r.export.source import open_source

    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(InputError, match="install another version of onnxruntime"):
        _open_session(open_source(publish_toy("unet")), tmp_path / "model.onnx")
