"""The scans of a shard plan -> volumes with their metadata, for `write_shard`; every volume also gets a ledger row.

Without sessions, each volume is a record. With sessions, the scans of a session are read, checked, and brought to the grid of
its reference. A scan that cannot be used is refused by itself, and its session goes into the corpus with the others.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.alignment import Aligned, align, find_copy, on_own_grid
from p2r.data.contrasts import split_contrasts
from p2r.data.foreground import foreground
from p2r.data.growth import PlannedScan, ShardPlan
from p2r.data.label_maps import CODE as LABEL_MAP
from p2r.data.label_maps import WAY_OUT, label_map_by_voxels
from p2r.data.ledger import LedgerRow, SessionPlace, accepted_row
from p2r.data.likeness import outline
from p2r.data.preparation import percentile_table, slice_axis
from p2r.data.read import read_scan, to_grid_of_job
from p2r.data.sidecar import closed_tags
from p2r.data.thumbnails import Thumbnails, thumbnail
from p2r.data.volume import Volume, voxels_sha256
from p2r.documents import as_utf8
from p2r.errors import RefusedScan

Described = tuple[Volume, dict[str, object]]


@dataclass(frozen=True)
class _Found:
    """A usable volume of a scan."""

    planned: PlannedScan
    volume: Volume
    key: str
    digest: str
    percentiles: tuple[float, ...]


@dataclass
class Records:
    """The records of a plan."""

    plan: ShardPlan
    config: IngestConfig
    rows: list[LedgerRow]
    """Receives a row for every volume, used or refused."""
    thumbnails: Thumbnails
    """Receives the thumbnails of the scans that a report shows."""
    _seen: dict[tuple[str, str], str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def read(self) -> Iterator[Described]:
        """Yield the usable volumes with their metadata; volumes of a session follow one another."""
        self._seen |= {(subject, digest): key for subject, digest, key in self.plan.known}
        if self.config.sessions is None:
            for planned in self.plan.scans:
                yield from self._read_single(planned)
            return
        sessions: dict[str, list[PlannedScan]] = defaultdict(list)
        for planned in self.plan.scans:
            sessions[planned.session].append(planned)
        for members in sessions.values():
            yield from self._read_session(members, self.config.sessions)

    def _read_single(self, planned: PlannedScan) -> Iterator[Described]:
        volumes = self._read_volumes(planned)
        for volume in volumes:
            found = self._examine(planned, volume)
            if found is None:
                continue
            self._seen[planned.subject, found.digest] = found.key
            if self._is_left_out(found):
                continue
            axis = slice_axis(volume.spacing_mm, self.config.slice_axis, shape=volume.data.shape)
            yield self._accept(found, axis=axis, is_shown=volume is volumes[0])

    def _read_session(self, members: list[PlannedScan], sessions: SessionsConfig) -> Iterator[Described]:
        found: dict[str, _Found] = {}
        for planned in members:
            for contrast, volume in self._read_contrasts(planned, sessions):
                examined = self._examine(planned, volume)
                if examined is not None:
                    found[contrast] = examined
        reference = self._choose_reference(found, sessions)
        if reference is None:
            return
        aligned = self._align(found, reference, sessions)
        self._refuse_copies(found, aligned, reference, sessions)
        grid = aligned[reference].volume
        axis = slice_axis(grid.spacing_mm, self.config.slice_axis, shape=grid.data.shape)
        for contrast in sessions.contrasts:
            if contrast not in aligned:
                continue
            one = found[contrast]
            self._seen[one.planned.subject, one.digest] = one.key
            if not self._is_left_out(one):
                place = _place_in_session(one.planned.session, contrast, aligned[contrast], reference)
                yield self._accept(one, axis=axis, is_shown=True, place=place, coverage=aligned[contrast].coverage)

    def _read_volumes(self, planned: PlannedScan) -> list[Volume]:
        """Return the volumes of a scan; none if it is refused."""
        try:
            return read_scan(planned.scan, self.config)
        except RefusedScan as error:
            self._refuse(planned, error)
            return []

    def _read_contrasts(self, planned: PlannedScan, sessions: SessionsConfig) -> list[tuple[str, Volume]]:
        """Return the volumes of a scan of a session by contrast."""
        volumes = self._read_volumes(planned)
        if len(volumes) > 1:
            message = (
                f"{planned.scan.path} has {len(volumes)} images, such as echoes, or magnitude and phase, for contrast "
                f"{planned.contrast}; convert the series, and list the images with the column contrast"
            )
            self._refuse(planned, RefusedScan("contrast_twice", message))
            return []
        if not volumes or sessions.fourth_axis == "time":
            return [(planned.contrast, volume) for volume in volumes if not self._holds_contrasts(planned, volume)]
        try:
            return list(split_contrasts(volumes[0], list(sessions.contrasts)).items())
        except RefusedScan as error:
            self._refuse(planned, error)
            return []

    def _holds_contrasts(self, planned: PlannedScan, volume: Volume) -> bool:
        """Refuse a volume whose fourth axis holds contrasts, by its `dataset.json`."""
        if planned.scan.num_channels == 1 or volume.data.shape[3] != planned.scan.num_channels:
            return False
        message = (
            f"{planned.scan.path} has {volume.data.shape[3]} images along its fourth axis, and its dataset.json states as many "
            "contrasts: set ingest.sessions.fourth_axis: contrasts"
        )
        self._refuse(planned, RefusedScan("other_frames", message))
        return True

    def _examine(self, planned: PlannedScan, volume: Volume) -> _Found | None:
        """Return a volume that can be used; refuse others."""
        # A series with several images has several keys; each begins with the key of the scan.
        part = volume.key.removeprefix(planned.scan.key)
        key = planned.key + part if planned.key + part not in self._taken else f"{planned.key}-part{part}"
        self._taken.add(key)
        if self.config.label_maps == "leave_out" and (reason := label_map_by_voxels(volume.data)):
            message = f"{planned.scan.path} {reason}, so it is taken for a label map; {WAY_OUT}"
            self._refuse(planned, RefusedScan(LABEL_MAP, message), key=key)
            return None
        try:
            percentiles = percentile_table(volume.data, name=planned.scan.path)
        except RefusedScan as error:
            self._refuse(planned, error, key=key)
            return None
        digest = volume.acquired_sha256 or voxels_sha256(volume)
        if original := self._seen.get((planned.subject, digest)):
            message = f"{planned.scan.path} has the same voxels as {original}"
            self._refuse(planned, RefusedScan("duplicate", message), key=key, copy_of=original)
            return None
        return _Found(planned, volume, key, digest, percentiles)

    def _is_left_out(self, found: _Found) -> bool:
        """Refuse a volume that the plan leaves out as a copy of another subject's."""
        original = dict(self.plan.without).get(found.key)
        if original is None:
            return False
        message = f"{found.planned.scan.path} has the same voxels as {original}, a scan of another subject"
        self._refuse(found.planned, RefusedScan("cross_subject_copy", message), key=found.key, copy_of=original)
        return True

    def _choose_reference(self, found: dict[str, _Found], sessions: SessionsConfig) -> str | None:
        """Return the contrast whose grid is kept, and bring it to the job's grid; None if the session has no usable one."""
        for contrast in sessions.by_priority:
            if contrast in found:
                try:
                    volume = to_grid_of_job(found[contrast].volume, self.config)
                except RefusedScan as error:
                    self._refuse(found[contrast].planned, error, key=found.pop(contrast).key)
                else:
                    found[contrast] = replace(found[contrast], volume=volume)
                    return contrast
            if sessions.without_reference == "refuse":
                break
        message = (
            f"its session has no usable scan of contrast {sessions.by_priority[0]}, the reference: give that scan, or set "
            "ingest.sessions.without_reference: next"
        )
        for one in found.values():
            self._refuse(one.planned, RefusedScan("no_reference", f"{one.planned.scan.path}: {message}"), key=one.key)
        return None

    def _align(self, found: dict[str, _Found], reference: str, sessions: SessionsConfig) -> dict[str, Aligned]:
        """Return the volumes on the reference's grid, by contrast; refuse those that cannot be brought to it."""
        kept = found[reference].volume
        aligned = {reference: on_own_grid(kept)}
        for contrast, one in found.items():
            if contrast == reference:
                continue
            try:
                result = align(one.volume, kept, min_coverage=sessions.min_coverage, contrast=reference)
                values = result.volume.data if result.covered is None else result.volume.data[result.covered]
                percentiles = percentile_table(values, name=one.planned.scan.path)
            except RefusedScan as error:
                self._refuse(one.planned, error, key=one.key)
                continue
            aligned[contrast] = result
            found[contrast] = replace(one, volume=result.volume, percentiles=percentiles)
        if reference != sessions.by_priority[0]:
            for contrast in aligned:
                volume = found[contrast].volume
                found[contrast] = replace(
                    found[contrast], volume=replace(volume, notes=(*volume.notes, "other_reference"))
                )
        return aligned

    def _refuse_copies(
        self, found: dict[str, _Found], aligned: dict[str, Aligned], reference: str, sessions: SessionsConfig
    ) -> None:
        """Refuse contrasts of a session that are one image under two names, one of which is wrong.

        The reference stays, because the session needs its grid. Of two others, neither is known to be the right one.
        """
        names = [name for name in sessions.by_priority if name in aligned]
        copies: dict[str, str] = {}
        for number, second in enumerate(names):
            for first in names[:number]:
                if first in copies:
                    continue
                is_same = found[second].digest == found[first].digest  # also if their headers state other positions
                if is_same or find_copy(found[second].volume, found[first].volume, aligned[second].covered):
                    copies[second] = first
                    if first != reference:
                        copies[first] = second
                    break
        for name, other in copies.items():
            one, original = found[name], found[other]
            how = (
                "has the same voxels as"
                if one.digest == original.digest
                else "is, up to a linear change of intensities,"
            )
            message = (
                f"{one.planned.scan.path} {how} {original.key}, the {other} of its session: one of the two names is wrong; "
                "leave that scan out with ingest.exclude, or list the scans with their contrasts in a column contrast"
            )
            self._refuse(one.planned, RefusedScan("duplicate", message), key=one.key, copy_of=original.key)
            del aligned[name]

    def _accept(
        self,
        found: _Found,
        *,
        axis: int,
        is_shown: bool,
        place: SessionPlace | None = None,
        coverage: tuple[float, ...] | None = None,
    ) -> Described:
        """Append the row of a volume, and return it with its metadata."""
        planned, volume = found.planned, found.volume
        is_hidden = self.config.pseudonyms
        acquisition = closed_tags(volume.sidecar) if is_hidden else dict(volume.sidecar)
        self.rows.append(
            accepted_row(
                key=found.key,
                source=planned.source,
                num_bytes=planned.num_bytes,
                modified=planned.modified,
                subject=planned.subject,
                volume=volume,
                axis=axis,
                percentiles=found.percentiles,
                voxels_sha256=found.digest,
                outline=outline(volume),
                place=place,
                acquisition=acquisition,
            )
        )
        if planned.is_shown and is_shown:
            self.thumbnails[found.key] = thumbnail(volume)
        meta = {
            "key": found.key if place is None else place.record,
            "subject": planned.subject,
            "cohort": self.config.cohort,
            "slice_axis": axis,
            "percentiles": list(found.percentiles),
            "source": planned.source if is_hidden else as_utf8(planned.scan.name),
            "voxels_sha256": found.digest,
            "licence": self.config.licence,
        }
        known = {
            "acquisition": acquisition,
            "entities": dict(planned.entities),
            "frames": None if volume.frames is None else list(volume.frames),
            "resampled_from_mm": None if volume.resampled_from_mm is None else list(volume.resampled_from_mm),
            "contrast": None if place is None else place.contrast,
            "coverage": None if coverage is None else list(coverage),
            "foreground": foreground(volume) if self.config.record == "blocks" else None,
        }
        return volume, meta | {name: value for name, value in known.items() if value}

    def _refuse(
        self, planned: PlannedScan, error: RefusedScan, *, key: str | None = None, copy_of: str | None = None
    ) -> None:
        message = "" if self.config.pseudonyms else as_utf8(error.message)
        self.rows.append(planned.refused_row(error.code, message, key=key, copy_of=copy_of))


def _place_in_session(record: str, contrast: str, aligned: Aligned, reference: str) -> SessionPlace:
    if not aligned.is_resampled:
        return SessionPlace(record, contrast)
    covered_fraction = None if aligned.coverage is None else round(aligned.covered_fraction, 4)
    return SessionPlace(record, contrast, resampled_to=reference, covered_fraction=covered_fraction)
