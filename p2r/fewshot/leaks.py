"""Detection of leaks: validation and test patients in the corpus of a backbone."""

from collections.abc import Iterable

from p2r.artefact import CorpusFacts
from p2r.backbone import Backbone
from p2r.data.corpus import contains
from p2r.data.volume import Volume, read_volume, voxels_sha256
from p2r.errors import DataError
from p2r.evaluate.tasks import Split, Task, TaskScan, acquired_sha256

_WAYS_OUT = (
    "Pretrain without it (ingest.subjects_of), remove it from the split, or label every row with --allow-transductive"
)


class Known:
    """Search for validation and test patients in the corpora of the backbone, by name and by voxels.

    Attributes:
        is_any: True if a patient was found, or may be in a corpus.
        is_unknown: True if the backbone's manifest lists no corpus: its pretraining may have seen any patient.

    Raises:
        DataError: if the manifest lists no corpus, and the job does not allow that.
    """

    def __init__(self, backbone: Backbone, *, is_allowed: bool) -> None:
        corpora = backbone.manifest.facts.corpora
        self._corpora = corpora or []
        self._is_allowed = is_allowed
        self.is_any = self.is_unknown = not corpora  # an empty list says as little as none
        if self.is_unknown and not is_allowed:
            raise DataError(
                f"the manifest of backbone {backbone.manifest.url} does not list the corpora of its pretraining: they may contain "
                "validation and test patients. Use a backbone with this list, or label every row with --allow-transductive"
            )

    def see_subject(self, subject: str, split: Split, *, task: Task) -> None:
        """Record whether a subject is in a corpus.

        Raises:
            DataError: if it is, and the job does not allow that.
        """
        for corpus in self._corpora:
            if contains(corpus, cohort=task.config.cohort, subject=subject):
                self._report_leak(f"subject {subject} of the {split} split of task {task.name}", corpus)

    def see_scan(self, scan: TaskScan, volumes: Iterable[Volume], split: Split) -> None:
        """Record whether one of the volumes of a case, under any name, is in a corpus.

        Raises:
            DataError: if it is, and the job does not allow that.
        """
        digests = [acquired_sha256(volume) for volume in volumes]
        # A corpus may have read contrasts along a fourth axis as frames of one series.
        digests += [voxels_sha256(read_volume(file)) for file in set(scan.images) if scan.images.count(file) > 1]
        for corpus in self._corpora:
            if any(contains(corpus, voxels_sha256=digest) for digest in digests):
                self._report_leak(f"scan {scan.key} of the {split} split", corpus)

    def _report_leak(self, item: str, corpus: CorpusFacts) -> None:
        if not self._is_allowed:
            raise DataError(f"{item} is in the backbone's corpus {corpus.url}: its results would leak. {_WAYS_OUT}")
        self.is_any = True
