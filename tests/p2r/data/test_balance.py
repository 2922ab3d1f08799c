"""Shares of a batch by contrast, scanner or field strength: exact, resumable, and the same on every number of ranks."""

import itertools
import json
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from p2r.config import BalanceConfig, ImageConfig, IngestConfig, PretrainConfig
from p2r.data.balance import read_balance
from p2r.data.batch import Batch
from p2r.data.corpus import ingest_locally
from p2r.data.manifest import Manifest, load_manifest
from p2r.data.shards import read_index
from p2r.data.stream import Corpus, Quarantine, StreamState, order_of, stream, stream_state
from p2r.errors import CheckpointError, DataError
from p2r.storage import Storage
from tests.p2r.data.conftest import some_voxels

IMAGE = ImageConfig(spacing_mm=2.0, size=32)
PATCHES = ImageConfig(dimensions=3, spacing_mm=2.0, size=16, patches_per_volume=2)
BRIGHTNESS = {"Siemens Prisma": 1, "GE": 4, "Philips": 16}
"""Factor of the intensities of each scanner's scans, by which the tests recognise them."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twelve scans in several shards: eight of one scanner, three of another and one of a third."""
    folder = tmp_path_factory.mktemp("scanners")
    makers = [*["Siemens Prisma"] * 4, "GE", "Philips", *["Siemens Prisma"] * 4, "GE", "GE"]
    (folder / "scans").mkdir()
    for number, maker in enumerate(makers):
        path = folder / "scans" / f"sub-{number:02d}_T1w.nii.gz"
        voxels = BRIGHTNESS[maker] * some_voxels(number, (20, 24, 4 + number % 3))
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 8.0, 1.0])), path)
        name, _, model = maker.partition(" ")
        tags = {"Manufacturer": name, "MagneticFieldStrength": 3 if model else 1.5}
        (folder / "scans" / f"sub-{number:02d}_T1w.json").write_text(
            json.dumps({**tags, **({"ManufacturersModelName": model} if model else {})})
        )
    storage = Storage(str(folder / "corpus"))
    list(ingest_locally(IngestConfig(sources=(str(folder / "scans"),), licence="CC0", shard_size_mib=0.012), storage))
    manifest = load_manifest(storage)
    assert len(manifest.shards) >= 3
    return Corpus(storage, manifest)


def batches(
    corpus: Corpus,
    num: int,
    *,
    state: StreamState | None = None,
    weights: dict[str, float] | None = None,
    by: Any = "scanner",
    **options: Any,
) -> list[tuple[Batch, StreamState]]:
    settings: dict[str, Any] = {"image": IMAGE, "seed": 3, "global_batch": 12, "state": state, **options}
    balance = read_balance(
        [corpus], BalanceConfig(by=by, weights=weights), image=settings["image"], contrasts=settings.get("contrasts")
    )
    with closing(stream(corpus, balance=balance, **settings)) as source:
        return list(itertools.islice(source, num))


def scanners_of(batch: Batch) -> Counter[str]:
    """Count the images by scanner, from their intensities only."""
    highs = torch.cat([group.high for group in batch.groups]).tolist()
    limits = {"Siemens Prisma": (0, 1200), "GE": (1200, 5000), "Philips": (5000, 30_000)}
    return Counter(name for high in highs for name, (low, top) in limits.items() if low < high <= top)


@pytest.mark.parametrize("image", [IMAGE, PATCHES])
def test_every_scanner_has_its_share_of_every_batch(corpus: Corpus, image: ImageConfig) -> None:
    for batch, _ in batches(corpus, 8, image=image, global_batch=6):
        assert scanners_of(batch) == dict.fromkeys(BRIGHTNESS, 2)
    for batch, _ in batches(corpus, 4, weights={"Siemens Prisma": 2, "GE": 1, "Philips": 0}):
        assert scanners_of(batch) == {"Siemens Prisma": 8, "GE": 4}
    (batch, _), *_ = batches(corpus, 1, by="field_strength")
    assert scanners_of(batch)["Siemens Prisma"] == 6


def test_a_pass_over_a_value_takes_each_of_its_images_once(corpus: Corpus) -> None:
    balance = read_balance([corpus], BalanceConfig(by="scanner"), image=IMAGE, contrasts=None)
    assert balance.values == ("GE", "Philips", "Siemens Prisma")
    assert [sum(counts) for counts in balance.num_samples] == [16, 6, 38]
    assert balance.images_per_step(12) == dict.fromkeys(balance.values, 4)
    assert balance.line(12).startswith(
        "balance by scanner | GE: 4 of 12 images in a batch, 16 in all, 4 steps for all, "
    )
    order = order_of([corpus], image=IMAGE, seed=3, global_batch=12, balance=balance)
    drawn = np.concatenate([batch.positions for batch, _ in batches(corpus, 4)])
    of_ge = drawn[order.locate(drawn)[0] == 0]
    assert sorted(of_ge.tolist()) == list(range(16))


@pytest.mark.parametrize("image", [IMAGE, PATCHES])
def test_balanced_batches_resume_and_are_the_same_on_other_ranks_and_threads(
    corpus: Corpus, image: ImageConfig
) -> None:
    options: dict[str, Any] = {"image": image, "global_batch": 6}
    whole = batches(corpus, 7, **options)
    saved = json.loads(json.dumps(whole[2][1].to_dict()))
    balance = read_balance([corpus], BalanceConfig(by="scanner"), image=image, contrasts=None)
    state = stream_state([corpus], seed=3, global_batch=6, balance=balance).resumed(saved)
    ranks = [batches(corpus, 4, state=state, rank=rank, world_size=3, num_threads=4, **options) for rank in range(3)]
    after = batches(corpus, 4, state=state, num_threads=1, prefetch=1, **options)
    for (batch, _), (again, _), *parts in zip(whole[3:], after, *ranks, strict=True):
        assert torch.equal(again.images()[0], batch.images()[0])
        assert torch.equal(torch.cat([part.images()[0] for part, _ in parts]), batch.images()[0])


def test_a_damaged_image_is_replaced_by_one_of_its_value(corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(corpus.storage.url.removeprefix("file://"), tmp_path / "copy")
    for index in (tmp_path / "copy").glob("shard-*.idx"):
        content = bytearray(index.with_suffix(".tar").read_bytes())
        for row in read_index(index):
            content[row.chunk_offsets[1] + 40] ^= 128  # the second slice of every scan
        index.with_suffix(".tar").write_bytes(content)
    copy = Corpus(Storage(str(tmp_path / "copy")), corpus.manifest)
    found = batches(copy, 6, quarantine=Quarantine(100))
    assert sum(len(batch.replaced) for batch, _ in found) > 5
    for batch, _ in found:
        assert scanners_of(batch) == dict.fromkeys(BRIGHTNESS, 4)


def test_a_share_of_a_contrast_is_drawn_from_the_sessions_that_have_it(
    session_corpus: tuple[Storage, Manifest], small_corpus: tuple[Storage, Manifest]
) -> None:
    sessions, names = Corpus(*session_corpus), ("flair", "t1ce")
    for batch, _ in batches(sessions, 6, by="contrast", contrasts=names, global_batch=8):
        assert batch.present is not None and (batch.present.sum(0) >= 4).all() and batch.present.any(1).all()
    both = [sessions, Corpus(*small_corpus, contrast="t2")]
    balance = read_balance(both, BalanceConfig(by="contrast"), image=IMAGE, contrasts=("t1ce", "t2"))
    options: dict[str, Any] = {"image": IMAGE, "seed": 0, "global_batch": 8, "contrasts": ("t1ce", "t2")}
    with closing(stream(both, balance=balance, **options)) as source:
        for batch, _ in itertools.islice(source, 4):
            assert batch.present is not None and batch.present.sum(0).tolist() == [4, 4]


def refusal(corpus: Corpus, by: Any, weights: dict[str, float] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        batches(corpus, 1, by=by, weights=weights)
    return str(caught.value)


def test_values_and_properties_that_a_corpus_lacks_are_refused(
    corpus: Corpus, small_corpus: tuple[Storage, Manifest]
) -> None:
    said = refusal(Corpus(*small_corpus), "scanner")
    assert "pretrain.balance.by is scanner, which no scan of" in said and "ingest these scans again" in said
    said = refusal(corpus, "scanner", {"GE": 1, "Sony": 1})
    assert "names 'Sony', which no record of" in said and "'GE' (3 records)" in said
    said = refusal(corpus, "scanner", {"GE": 1, "Philips": 1})
    assert "lacks 'Siemens Prisma'" in said and "0 leaves its records out" in said
    said = refusal(corpus, "scanner", {"GE": 1, "Philips": 5, "Siemens Prisma": 1})
    assert "scanner Philips has 6 samples, fewer than its 8 of a global batch: lower its weight" in said
    said = refusal(corpus, "scanner", {"GE": 1, "Philips": 100, "Siemens Prisma": 100})
    assert "give scanner GE less than one of the 12 lanes" in said
    named = Corpus(*small_corpus, contrast="t2")
    with pytest.raises(DataError, match=r"have the same: 't2' \(12 records\); leave out pretrain\.balance"):
        read_balance([named], BalanceConfig(by="contrast"), image=IMAGE, contrasts=("t2",))


def test_a_balanced_run_does_not_continue_as_another(corpus: Corpus) -> None:
    balance = read_balance([corpus], BalanceConfig(by="scanner"), image=IMAGE, contrasts=None)
    plain = stream_state([corpus], seed=3, global_batch=12)
    balanced = stream_state([corpus], seed=3, global_batch=12, balance=balance)
    assert "balance" not in plain.to_dict()  # readable by versions without it
    for one, other in itertools.permutations([plain, balanced], 2):
        with pytest.raises(CheckpointError, match="data stream has balance"):
            one.resumed(json.loads(json.dumps(other.to_dict())))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"balance": {"by": "contrast"}}, "needs the names of the contrasts"),
        ({"balance": {"by": "scanner"}, "neighbours": 0.5}, "balance needs neighbours 0"),
        ({"balance": {"by": "scanner", "weights": {"GE": 0}}}, "must not all be 0"),
        ({"balance": {"by": "scanner"}, "corpus": [{"url": "a", "weight": 1}]}, "leave out one of them"),
    ],
)
def test_a_balance_that_contradicts_the_job_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainConfig.model_validate({"image": {"spacing_mm": 2, "size": 32}, "steps": 1, "global_batch": 8, **fields})
