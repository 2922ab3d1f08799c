"""Folders, lists and tasks as people have them, each with its outcome: a part of docs/inputs.md.

Files are empty: names, links and lists decide, and no voxel is read.
"""

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SUBJECTS = range(6)


@dataclass(frozen=True)
class FolderCase:
    """A source of a corpus, or a task, and its outcome."""

    name: str
    kind: str
    """folder, list or task."""
    write: Callable[[Path], Path]
    """Writes the files below a folder; returns the source, or the task's YAML."""
    outcome: str
    """Beginning of the refusal's message after the path, or `N scans of M subjects`."""
    refused: bool = False

    def row(self) -> str:
        """Line of the table."""
        return f"| {self.name} | {self.kind} | {'refused: ' * self.refused}{self.outcome} |"


def touch(root: Path, names: Iterable[str]) -> Path:
    """Write empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def _named(form: str) -> Callable[[Path], Path]:
    return lambda root: touch(root, (form.format(number) for number in SUBJECTS))


def _linked(root: Path) -> Path:
    touch(root / "store", ("sub-0/sub-0_T1w.nii.gz", "sub-1/sub-1_T1w.nii.gz"))
    touch(root / "mine", ("sub-0/sub-0_T1w.nii.gz",))
    (root / "mine" / "sub-1").symlink_to(root / "store" / "sub-1")
    (root / "mine" / "again").symlink_to(root / "mine")
    return root / "mine"


def _dead_links(root: Path) -> Path:
    (touch(root, ("a.nii.gz",)) / "b.nii.gz").symlink_to(root / "absent.nii.gz")
    (root / "readme.txt").symlink_to(root / "absent.txt")
    return root


def _bids(root: Path) -> Path:
    names = ("dataset_description.json", "derivatives/fmriprep/sub-0/anat/sub-0_T1w.nii.gz", "sourcedata/raw.nii.gz")
    return touch(root, (*names, *(f"sub-{n}/ses-a/anat/sub-{n}_ses-a_T1w.nii.gz" for n in SUBJECTS)))


def _nnunet(root: Path) -> Path:
    touch(root, (f"imagesTr/heart_{n:03d}_000{c}.nii.gz" for n in SUBJECTS for c in range(2)))
    touch(root, (f"labelsTr/heart_{n:03d}.nii.gz" for n in SUBJECTS))
    (root / "dataset.json").write_text(
        '{"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "LV": 1}}'
    )
    return root


def _list(name: str, text: str, *, encoding: str = "utf-8") -> Callable[[Path], Path]:
    """Return a writer of a list; `{scan}` in the text is the path of a scan."""

    def write(root: Path) -> Path:
        touch(root, ("scans/P00.nii.gz", "scans/P01.nii.gz"))
        (root / name).write_bytes(text.format(scan=root / "scans/P00.nii.gz").encode(encoding))
        return root / name

    return write


def _task(
    *, images: str = "P{:02d}.nii.gz", more: tuple[str, ...] = (), label_of_first: str | None = None
) -> Callable[[Path], Path]:
    """Return a writer of a task with images/ and labels/."""

    def write(root: Path) -> Path:
        touch(root / "images", (images.format(number) for number in SUBJECTS))
        labels = [f"P{number:02d}.nii.gz" for number in SUBJECTS]
        touch(root / "labels", [*([label_of_first] if label_of_first else labels[:1]), *labels[1:]])
        touch(root, more)
        path = root / "task.yaml"
        path.write_text(
            "name: organs\ntitle: Organs\nimages: images\nlabels: labels\nlicence: CC0-1.0\ncitation: None\ncohort: organs\n"
            "subject_pattern: ^(.+?)\\.nii\nclasses: {1: organ}\nsplit_rule: {seed: 0, validation: 1, test: 2}\n"
        )
        return path

    return write


def _decomposed(root: Path) -> Path:
    path = _task()(root)
    for part, form in (("images", "NFD"), ("labels", "NFC")):
        name = unicodedata.normalize(form, "M\u00fcller")  # type: ignore[arg-type]
        (root / part / "P00.nii.gz").rename(root / part / f"{name}.nii.gz")
    return path


def _self_link(root: Path) -> Path:
    (root / "again.nii").symlink_to(root / "again.nii")
    return root


ODD_NAMES = (
    *(
        "with space.nii",
        "hash#1.nii",
        "percent%20.nii",
        "plus+1.nii",
        "quote'1.nii",
        "semi;colon.nii",
        "brackets[1].nii",
    ),
    *("star*.nii", "-dash.nii", "newline\n.nii", "\u60a3\u8005.nii", "y" * 240 + ".nii", "Scan.nii", "scan.nii"),
)
SNAPSHOT = tuple(
    f"{part}/.snapshot/hourly.0/P{number:02d}.nii.gz" for part in ("images", "labels") for number in SUBJECTS
)

FOLDER_CASES = [
    FolderCase("one folder, a file each", "folder", _named("P{:03d}.nii.gz"), "6 scans of 6 subjects"),
    FolderCase("endings in upper case", "folder", _named("P{:03d}.NII.GZ"), "6 scans of 6 subjects"),
    FolderCase(
        "two contrasts in one folder",
        "folder",
        lambda root: _named("P{:03d}_T2.nii")(_named("P{:03d}_T1.nii")(root)),
        "12 scans of 6 subjects",
    ),
    FolderCase(
        "header and voxels in two files",
        "folder",
        lambda root: _named("P{}.img")(_named("P{}.hdr")(root)),
        "6 scans of 6 subjects",
    ),
    FolderCase(
        "hidden files and snapshots beside the scans",
        "folder",
        lambda root: touch(
            _named("P{}.nii")(root), ("._P0.nii", ".snapshot/h/P0.nii", "__MACOSX/P0.nii", ".git/annex/objects/a.nii")
        ),
        "6 scans of 6 subjects",
    ),
    FolderCase(
        "spaces, quotes, brackets, line breaks, %20 and other scripts in names",
        "folder",
        lambda root: touch(root, ODD_NAMES),
        f"{len(ODD_NAMES)} scans of {len(ODD_NAMES)} subjects",
    ),
    FolderCase(
        "two scans of a patient, one named by a Mac",
        "folder",
        lambda root: touch(
            root,
            (
                unicodedata.normalize("NFD", "M\u00fcller") + "_T1.nii",
                unicodedata.normalize("NFC", "M\u00fcller_T2.nii"),
            ),
        ),
        "2 scans of 1 subject, M\u00fcller",
    ),
    FolderCase(
        "the same name with two endings",
        "folder",
        lambda root: touch(root, ("x.nii", "x.nii.gz")),
        "2 scans of 1 subject, x",
    ),
    FolderCase(
        "checkpoints of a notebook, objects of git-annex",
        "folder",
        lambda root: touch(
            _named("P{}.nii")(root),
            (".ipynb_checkpoints/P0-checkpoint.nii", ".git/annex/objects/MD5E-s9--9.nii", "Thumbs.db"),
        ),
        "6 scans of 6 subjects",
    ),
    FolderCase(
        "a link to itself", "folder", lambda root: _self_link(touch(root, ("P0.nii",))), "2 scans of 2 subjects"
    ),
    FolderCase(
        "label maps beside the scans",
        "folder",
        lambda root: _named("P{}_seg.nii")(_named("P{}_t1.nii")(root)),
        "6 scans of 6 subjects, 6 label maps",
    ),
    FolderCase(
        "a folder of subjects, one of them a link, and a link to itself", "folder", _linked, "2 scans of 2 subjects"
    ),
    FolderCase("links that lead nowhere", "folder", _dead_links, "2 scans of 2 subjects"),
    FolderCase(
        "BIDS, with sessions, derivatives and sources", "folder", _bids, "6 scans of 6 subjects, 2 folders not read"
    ),
    FolderCase("nnU-Net, two channels", "folder", _nnunet, "12 scans of 6 subjects, 6 label maps"),
    FolderCase(
        "no image",
        "folder",
        lambda root: touch(root, ("notes.txt",)),
        "holds no .nii, .nii.gz, .hdr/.img or DICOM file",
        refused=True,
    ),
    FolderCase(
        "comma, and a space after it", "list", _list("l.csv", "path, subject\n{scan}, A\n"), "1 scan of 1 subject, A"
    ),
    FolderCase("semicolons", "list", _list("l.csv", "path;subject\n{scan};A\n"), "1 scan of 1 subject, A"),
    FolderCase(
        "names of columns in upper case", "list", _list("l.csv", "Path,Subject\n{scan},A\n"), "1 scan of 1 subject, A"
    ),
    FolderCase(
        "participant_id of BIDS",
        "list",
        _list("l.tsv", "participant_id\tpath\nsub-A\t{scan}\n"),
        "1 scan of 1 subject, sub-A",
    ),
    FolderCase(
        "paths below the list's folder",
        "list",
        _list("l.csv", "path\nscans/P00.nii.gz\nscans/P01.nii.gz\n"),
        "2 scans of 2 subjects",
    ),
    FolderCase(
        "blank rows, and rows of commas",
        "list",
        _list("l.csv", "path,subject\n\n{scan},A\n,\n"),
        "1 scan of 1 subject, A",
    ),
    FolderCase(
        "JSON, an object a line",
        "list",
        _list("l.jsonl", '{{"path": "{scan}", "patient": "A"}}\n'),
        "1 scan of 1 subject, A",
    ),
    FolderCase(
        "UTF-16, as spreadsheets write it",
        "list",
        _list("l.csv", "path,subject\n{scan},A\n", encoding="utf-16"),
        "1 scan of 1 subject, A",
    ),
    FolderCase(
        "UTF-8 with a byte order mark",
        "list",
        _list("l.csv", "path,subject\n{scan},A\n", encoding="utf-8-sig"),
        "1 scan of 1 subject, A",
    ),
    FolderCase(
        "Latin-1",
        "list",
        _list("l.csv", "path,subject\n{scan},M\u00fcller\n", encoding="latin-1"),
        "is not UTF-8 text",
        refused=True,
    ),
    FolderCase(
        "no column called path",
        "list",
        _list("l.csv", "file,subject\n{scan},A\n"),
        "the first line must name each column once",
        refused=True,
    ),
    FolderCase(
        "a file that is absent", "list", _list("l.csv", "path\nscans/P77.nii.gz\n"), "line 2: there is no", refused=True
    ),
    FolderCase(
        "one scan twice", "list", _list("l.csv", "path\n{scan}\n{scan}\n"), "keep one row per scan", refused=True
    ),
    FolderCase("images and labels", "task", _task(), "6 cases of 6 patients"),
    FolderCase("a file server's snapshots in both folders", "task", _task(more=SNAPSHOT), "6 cases of 6 patients"),
    FolderCase(
        "checkpoints of a notebook and objects of git-annex",
        "task",
        _task(more=("images/.ipynb_checkpoints/P00-checkpoint.nii.gz", "images/.git/annex/objects/MD5E-s9--9.nii.gz")),
        "6 cases of 6 patients",
    ),
    FolderCase(
        "images whose endings are in upper case", "task", _task(images="P{:02d}.NII.GZ"), "6 cases of 6 patients"
    ),
    FolderCase("a name that a Mac wrote, its label map from Linux", "task", _decomposed, "6 cases of 6 patients"),
    FolderCase(
        "a label map without its scan, and a scan without its label map",
        "task",
        _task(label_of_first="P77.nii.gz"),
        "no label map of the same name",
        refused=True,
    ),
]
