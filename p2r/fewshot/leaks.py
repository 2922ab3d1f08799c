"""Validation and test patients who are in the corpus of a backbone: figures of them would leak."""

from collections.abc import Mapping
from typing import Any

from p2r.backbone import Backbone
from p2r.data.corpus import contains
from p2r.data.shards import voxels_sha256
from p2r.data.volume import Volume
from p2r.errors import DataError
from p2r.evaluate.tasks import Split, Task, TaskScan

_WAYS_OUT = (
    "Pretrain without it (ingest.subjects_of), take it out of the split, or label every row with --allow-transductive"
)


class Known:
    """Looks for validation and test patients in the corpora of the backbone, by name and by voxels.

    Attributes:
        is_any: Whether one of them was found, or may be there.
        is_unknown: Whether the backbone's manifest says nothing of its corpora: any patient may be in them.

    Raises:
        DataError: It says nothing, and the job does not allow that.
    """

    def __init__(self, backbone: Backbone, *, is_allowed: bool) -> None:
        corpora = backbone.manifest["corpora"]
        self._corpora = corpora or []
        self._is_allowed = is_allowed
        self.is_any = self.is_unknown = corpora is None
        if self.is_unknown and not is_allowed:
            raise DataError(
                f"the manifest of backbone {backbone.manifest['url']} does not say which corpora it was pretrained on: validation and "
                "test patients may be among them. Take a backbone that says it, or label every row with --allow-transductive"
            )

    def see_subject(self, subject: str, split: Split, *, task: Task) -> None:
        """Note whether a subject is in a corpus.

        Raises:
            DataError: It is, and the job does not allow it.
        """
        for corpus in self._corpora:
            if contains(corpus, cohort=task.config.cohort, subject=subject):
                self._found(f"subject {subject} of the {split} split of task {task.name}", corpus)

    def see_scan(self, scan: TaskScan, volume: Volume, split: Split) -> None:
        """Note whether a scan, by whatever name, is in a corpus.

        Raises:
            DataError: It is, and the job does not allow it.
        """
        digest = voxels_sha256(volume)
        for corpus in self._corpora:
            if contains(corpus, voxels_sha256=digest):
                self._found(f"scan {scan.key} of the {split} split", corpus)

    def _found(self, what: str, corpus: Mapping[str, Any]) -> None:
        if not self._is_allowed:
            raise DataError(f"{what} is in the backbone's corpus {corpus['url']}: its figures would leak. {_WAYS_OUT}")
        self.is_any = True
