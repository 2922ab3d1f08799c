"""The `p2r` command. Results go to stdout, progress to stderr.

Exit codes: 0 done; 2 invalid input, with one message; 1 any other error; 130 interrupted; 143 stopped by SIGTERM, with a
checkpoint to resume from.
"""

import io
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2r.console import console, show, show_json, visible
from p2r.errors import InputError, JobError, P2RError, TrainingError, missing_package
from p2r.files import lack_of_space
from p2r.identity import ensure_identity
from p2r.logs import configure, reset, say, say_crash, say_error

if TYPE_CHECKING:  # `p2r --help` imports neither
    from p2r.config import PretrainConfig
    from p2r.job import Job

_STOPPED = 128 + signal.SIGTERM

app = typer.Typer(
    name="p2r",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from p2r.version import __version__, code_version

        show(f"p2r {__version__} ({code_version()})")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and the commit."),
    ] = False,
) -> None:
    """Pixel-level foundation models for MRI: from scans to a few-shot report."""


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the job, such as pretrain.steps=20."),
]
JobPath = Annotated[
    Path,
    typer.Argument(metavar="JOB", help="A job file, or the name of a job that comes with p2r, such as demo."),
]
AllowTransductive = Annotated[
    bool,
    typer.Option(
        "--allow-transductive",
        help="Continue although validation or test patients are in the backbone's corpus; every row of the report is labelled.",
    ),
]
Sign = Annotated[
    Path | None, typer.Option(metavar="KEY", help="Private key (PEM file) with which to sign the published artefact.")
]
Fork = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Start a new run at step 0 from the newest checkpoint's weights, in <storage>-NAME (or NAME, if a URL); the same command "
        "resumes it.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and the output of workers.")]


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="JOB-or-TASK...", help="Job files or task files.")],
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Check job and task files, and every path in them, without running anything."""
    from cluster.validate import is_task, job_facts, task_facts

    refused = 0
    for path in files:
        try:
            if is_task(path):
                unset_in_task: dict[str, str] = {}
                facts, unset, words = [*task_facts(path, unset=unset_in_task)], list(unset_in_task), "task"
            else:
                job, unset, facts = job_facts(path, tuple(set_ or ()))
                words = f"{job.kind}  {job.storage}"
                if ranks := _allowed_ranks(job):
                    facts.append(f"pretrain on {', '.join(map(str, ranks))} workers")
            needs = "".join(f"  needs {name}" for name in unset)
            lines = [f"valid    {path}  {words}{needs}", *(f"         {fact}" for fact in facts)]
        except InputError as error:
            refused += 1
            say(f"refused  {error}")
        else:
            for line in lines:
                show(line)
    if refused:
        raise JobError(f"{refused} of {len(files)} files refused")


def _allowed_ranks(job: "Job") -> list[int]:
    """Return the numbers of workers that can share the job's global batch; refuse a job whose number cannot."""
    from p2r.data.order import allowed_world_sizes, check_world_size, sizes_for_micro_batch, world_sizes_between

    if job.pretrain is None or job.kind in ("publish", "finetune"):
        return []
    wanted, micro_batch = job.resources.num_workers, job.pretrain.micro_batch
    if isinstance(wanted, int):
        check_world_size(job.pretrain.global_batch, wanted)
        sizes_for_micro_batch(job.pretrain.global_batch, [wanted], micro_batch)
    sizes = allowed_world_sizes(job.pretrain.global_batch)
    if isinstance(wanted, tuple):
        sizes = world_sizes_between(job.pretrain.global_batch, *wanted)
    return sizes_for_micro_batch(job.pretrain.global_batch, sizes, micro_batch)


@app.command()
def run(
    path: JobPath,
    set_: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, or this machine.")] = None,
    allow_transductive: AllowTransductive = False,
    profile: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Number of pretraining steps to profile, after a few others.")
    ] = 0,
    fork: Fork = None,
    log_format: Annotated[
        str | None,
        typer.Option(help="text, json, or auto: text on a terminal, JSON elsewhere; default: P2R_LOG_FORMAT, or auto."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a job on Ray; running it again resumes it."""
    from p2r.job import find_job, ignored_variables, overrides_of, read_job

    configure(log_format)
    job = read_job(path, overrides_of(set_, allow_transductive=allow_transductive))
    for note in ignored_variables(path, job):
        say(f"note: {note}")
    if fork:
        from p2r.pipeline.fork import forked

        job = forked(job, fork)
    configure(log_format, run=job.name)
    if (brought := find_job(path)) != path:
        say(f"job | {path}: no such file; using the job that comes with p2r, {brought}")
    from p2r.pipeline.finished import made_before
    from p2r.pipeline.lines import FINISHED

    made = None if profile else made_before(job)
    if made is None:
        made = _run_on_ray(job, path, address, profile_steps=profile, debug=debug)
    else:
        say(FINISHED)
    failed = made.pop("failed", [])
    _print_made(made)
    if "unfinished" in made:
        sys.exit(_STOPPED)
    if failed:
        from p2r.fewshot.search import failure_message

        raise TrainingError(failure_message(failed))


def _run_on_ray(job: Any, path: Path, address: str | None, *, profile_steps: int, debug: bool) -> dict[str, Any]:
    from cluster.starting import started_session

    with started_session(address, job=path, show_worker_logs=debug, say=say):
        # Torch takes seconds to import; `p2r validate` needs neither it nor Ray.
        from cluster.executor import RayExecutor
        from p2r.pipeline.stages import run_job

        with RayExecutor(job, profile_steps=profile_steps) as executor:
            return run_job(job, executor, say=say)


Form = Annotated[
    str | None,
    typer.Option("--from", metavar="FORM", help="Layout of the scans: nnunet, msd, bids or folder; default: detected."),
]
Labels = Annotated[Path | None, typer.Option(help="Folder of the label maps; default: searched below the scans.")]
Contrast = Annotated[
    str | None,
    typer.Option(help="Part of the labelled scans' names, if there are several contrasts."),
]


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="A folder of scans, or s3://: nnU-Net, Decathlon, BIDS or any other.")],
    labels: Labels = None,
    form: Form = None,
    contrast: Contrast = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file: middle planes of some scans.")] = Path(
        "p2r-check.png"
    ),
    read_all: Annotated[bool, typer.Option("--all", help="Read every scan, not only a sample within seconds.")] = False,
    debug: Debug = False,
) -> None:
    """Report within seconds how p2r reads a folder: scans, subjects, label maps, and the job and task it would write."""
    from cluster import own
    from cluster.applying import check_output

    check_output(output, (".png",))
    own.check(folder, labels=labels, form=_check_form(form), contrast=contrast, output=output, read_all=read_all)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for job.yaml and task.yaml; created if absent.")],
    scans: Annotated[str, typer.Option(help="Folder of the scans, or s3://: nnU-Net, Decathlon, BIDS or any other.")],
    labels: Labels = None,
    form: Form = None,
    contrast: Contrast = None,
    name: Annotated[str | None, typer.Option(help="Name of the job and the task; default: the name of FOLDER.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data: an SPDX identifier or a name.")] = None,
    provenance: Annotated[str | None, typer.Option(help="Origin of the data, and how to cite them.")] = None,
    debug: Debug = False,
) -> None:
    """Write the first job and task for your own scans, and print the next three commands."""
    from cluster import own

    own.init(
        folder,
        scans=scans,
        labels=labels,
        form=_check_form(form),
        contrast=contrast,
        name=name,
        licence=licence,
        provenance=provenance,
    )


def _check_form(name: str | None) -> Any:
    from p2r.data.survey import NAMES

    if name is not None and name not in NAMES:
        raise InputError(f"--from {name}: must be one of {', '.join(NAMES)}")
    return name


@app.command()
def submit(
    path: JobPath,
    set_: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Job server, http://HOST:8265; default: RAY_API_SERVER_ADDRESS.")
    ] = None,
    allow_transductive: AllowTransductive = False,
    fork: Fork = None,
    debug: Debug = False,
) -> None:
    """Submit a job to a Ray cluster from the repository's root, and follow its log."""
    from p2r.job import overrides_of, read_job

    overrides = overrides_of(set_, allow_transductive=allow_transductive)
    read_job(path, overrides)
    from cluster.submit import submit as submit_to_ray

    submit_to_ray(path, overrides, address=address, fork=fork)


@app.command()
def schema() -> None:
    """Print the JSON Schema of job files."""
    from p2r.job import json_schema

    show_json(json_schema())


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="A corpus, backbone, model, or a job's storage.")],
    json_: Annotated[bool, typer.Option("--json", help="Print a corpus's manifest instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show the contents of a URL."""
    from cluster.inspect import inspect as show_contents

    show_contents(url, as_json=json_)


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="A corpus, backbone or model; @sha256:HEX pins its manifest.")],
    key: Annotated[
        str | None,
        typer.Option(help="Public key that must have signed a backbone or model: a PEM file, or ed25519:HEX."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check every digest of a corpus, backbone or model, and its signature."""
    from cluster.verify import verify as verified

    for line in verified(url, key=key):
        show(line)


@app.command()
def publish(path: JobPath, set_: Overrides = None, sign: Sign = None, debug: Debug = False) -> None:
    """Publish the last checkpoint of a job's pretraining, as set in its section publish; in this process, without Ray."""
    from p2r.job import read_job
    from p2r.pipeline.stages import publish_backbone
    from p2r.storage import Storage

    job = read_job(path, tuple(set_ or ()))
    if job.publish is None:
        raise JobError(f"job {path} has no section publish; give a job of kind publish, pipeline or ablation")
    published = publish_backbone(job, Storage(job.storage), say)
    _print_made({"backbone": published["url"], "backbone_pin": published["pin"]})
    if sign is not None:
        show(_verify_and_sign(published["pin"], sign))


@app.command()
def sign(
    url: Annotated[str, typer.Argument(help="A backbone or model; @sha256:HEX pins its manifest.")],
    key: Annotated[
        Path, typer.Option(help="Private key, a PEM file: openssl genpkey -algorithm ed25519 -out private.pem")
    ],
    debug: Debug = False,
) -> None:
    """Check a published backbone or model, and sign its manifest."""
    show(_verify_and_sign(url, key))


def _verify_and_sign(url: str, key: Path) -> str:
    from p2r.artefact import open_artefact
    from p2r.backbone import verify_artefact
    from p2r.reference import parse_reference

    artefact = open_artefact(parse_reference(url))
    verify_artefact(artefact)
    return f"signed: {artefact.sign(key)}"


@app.command()
def status(
    job_or_url: Annotated[str, typer.Argument(metavar="JOB-or-URL", help="A job file, or the storage of a run.")],
    set_: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve a live page until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page; 0: any free one.")] = 8321,
    host: Annotated[str, typer.Option(help="Address on which the page listens.")] = "127.0.0.1",
    json_: Annotated[bool, typer.Option("--json", help="Print the content of the page as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the state of a run, read only from its storage: from any machine, while it runs or after it died."""
    from cluster.status import target_of
    from cluster.status_reader import Reader

    if watch + web + json_ > 1:
        raise InputError("--watch, --web and --json exclude one another: give one of them")
    name, storage = target_of(job_or_url, tuple(set_ or ()))
    reader = Reader(name, storage)
    if web:
        from cluster.status_server import serve

        serve(reader, host=host, port=port, is_local=storage.is_local)
        return
    if json_:
        from dataclasses import asdict

        show_json(asdict(reader.read()))
        return
    from cluster.status_terminal import show_run, watch_run

    (watch_run if watch else show_run)(reader)


@app.command(name="tune-batch")
def tune_batch(
    path: JobPath,
    set_: Overrides = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory of a worker, GiB; default: all of the GPU's. Required without a GPU."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Find how many images and pixel pairs of a job's pretraining fit into memory, by trying on this machine."""
    from p2r.device import this_device
    from p2r.job import read_job
    from p2r.planning.tune_batch import tune_batch as tune

    config = _pretrain_config(read_job(path, tuple(set_ or ())), path)
    found = tune(config, device=this_device(), memory_gib=memory_gib, say=say)
    _print_rows(
        ("images", "pairs per image", "peak MiB", "img/s"),
        [
            (
                str(one.images),
                str(one.pairs),
                *(f"{x:.1f}" if x is not None else "-" for x in (one.peak_mib, one.images_per_s)),
            )
            for one in found.trials
        ],
    )
    show(f"a worker fits up to {found.images} images at once, and for these up to {found.pairs} pixel pairs each")
    show()
    _print_rows(
        ("workers", "images of each", "pretrain.micro_batch"),
        [(str(cut.num_workers), str(cut.images), str(cut.micro_batch or "null")) for cut in found.cuts],
        title=f"pretrain.global_batch: {config.global_batch}",
    )


@app.command()
def plan(
    path: JobPath,
    set_: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    workers_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers per machine; default: resources.num_workers divided by the nodes, or the GPUs here."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: the job's request, or this machine's.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.01, help="Memory of a worker, GiB; default: this machine's GPU, if any.")
    ] = None,
    images_per_s_per_worker: Annotated[
        float | None, typer.Option(min=1e-9, help="Default: measured from the job's own run, if there was one.")
    ] = None,
    cost_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of one worker, in any currency.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Estimate memory, traffic, duration and cost of a job's pretraining on a cluster, without starting anything."""
    from cluster.plan import show_plan
    from p2r.job import read_job

    job = read_job(path, tuple(set_ or ()), unset={})
    show_plan(
        job,
        _pretrain_config(job, path),
        num_nodes=nodes,
        workers_per_node=workers_per_node,
        device=device,
        memory_gib=memory_gib,
        images_per_s=images_per_s_per_worker,
        cost_per_hour=cost_per_hour,
        as_json=json_,
        say=say,
    )


def _print_rows(columns: tuple[str, ...], rows: list[tuple[str, ...]], *, title: str | None = None) -> None:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _pretrain_config(job: "Job", path: Path) -> "PretrainConfig":
    if job.pretrain is None:
        raise JobError(f"job {path} has no section pretrain; give a job of kind pretrain, pipeline or ablation")
    return job.pretrain


@app.command()
def compare(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Storages of finished jobs, URLs of a report.json, or backbones inside such a storage "
            "(STORAGE/backbones/NAME/VERSION). A comes first.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Folder or URL for comparison.html, comparison.json and pictures."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare the reports of several runs or backbones, with their differences patient by patient.

    A backbone selects its own rows in its storage's report, and the rows from scratch. Settings that differ between the jobs
    are listed above the results.
    """
    from p2r.report.comparison import compare_runs
    from p2r.report.comparison_page import write_comparison
    from p2r.report.comparison_tables import comparison_table, notes_of, reasons_of, settings_table
    from p2r.report.runs import read_runs
    from p2r.storage import Storage

    storage = None if output is None else Storage(output)
    if storage is not None:
        storage.check_writable()
    runs = read_runs(urls)
    comparison = compare_runs(runs)
    tables = console(width=140)
    for run in runs:
        named = [run.job, run.backbone, run.backbone_sha256[:12]]
        show(f"{run.letter}  {' '.join(filter(None, (*named, run.url)))}")
    for note in notes_of(comparison):
        show(f"note: {note}")
    differ = settings_table(comparison)
    if differ.row_count:
        tables.print(differ)
    tables.print(comparison_table(comparison))
    for reason in reasons_of(comparison):
        show(reason)
    if storage is not None:
        show(f"page: {write_comparison(storage, comparison)}")


@app.command()
def views(
    path: JobPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file.")],
    scan: Annotated[Path | None, typer.Option(help="A NIfTI scan; default: a virtual subject.")] = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Draw the effect of a job's section pretrain.views on an image: every transform over its range."""
    from cluster.applying import check_output
    from p2r.data.phantom import resolve_source
    from p2r.data.volume import read_volume
    from p2r.job import read_job
    from p2r.report import image_of, view_sheet

    job = read_job(path, tuple(set_ or ()))
    config = _pretrain_config(job, path)
    check_output(output, (".png",))
    volume = read_volume(scan or next(resolve_source("template://icbm152/images?subjects=1").glob("*.nii.gz")))
    image, inside = image_of(volume, config.image)
    output.write_bytes(view_sheet(image, inside, config=config.views, spacing_mm=config.image.spacing_mm))
    show(output)


@app.command()
def embed(
    backbone: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="URL of a published backbone; @sha256:HEX pins its manifest.")
    ],
    scan: Annotated[
        list[str],
        typer.Argument(
            metavar="SCAN...",
            help="A NIfTI scan (a path, file:// or s3://), or a folder of scans; or the scans of one patient by contrast, as in "
            "t1=t1.nii.gz flair=flair.nii.gz. The grid of the result is that of the first.",
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="NIfTI file for the features (X, Y, Z, F); for a folder: a folder.")
    ],
    native: Annotated[
        bool, typer.Option("--native", help="Use the scan's own grid instead of the backbone's.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Write the features of every pixel of a scan, or of all scans of a folder, in the scan's world coordinates."""
    from cluster.applying import embed as apply

    apply(backbone, scan, output, native=native, device=device, say=say)


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="URL of a published model; @sha256:HEX pins its manifest.")
    ],
    scan: Annotated[
        list[str],
        typer.Argument(
            metavar="SCAN...",
            help="A NIfTI scan (a path, file:// or s3://), or a folder of scans; or the scans of one patient by contrast, as in "
            "t1=t1.nii.gz flair=flair.nii.gz. The grid of the result is that of the first.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", help="NIfTI file for the segmentation, on the scan's own grid; for a folder: a folder."
        ),
    ],
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Write NAME_probabilities.nii.gz beside NAME.nii.gz, too: a volume per class, background first, which add up to 1.",
        ),
    ] = False,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="One more model, whose probabilities are averaged with MODEL's; may be repeated. Same classes, same preparation.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Segment a scan, or all scans of a folder; for a folder, volumes per class are also written to volumes.csv."""
    from cluster.applying import predict as apply

    apply([model, *(ensemble or ())], scan, output, has_probabilities=probabilities, device=device, say=say)


def main() -> None:
    """Run the command line, and turn errors into exit codes."""
    try:
        if (notice := ensure_identity()) is not None:
            say(notice)
        _run_command()
    except KeyboardInterrupt:
        say("p2r: interrupted; run the same command again to resume from the newest checkpoint")
        sys.exit(130)
    except P2RError as error:
        if "--debug" in sys.argv:
            say(traceback.format_exc().rstrip())
        code = 2 if isinstance(error, InputError) else 1
        say_error(error, code=code)
        sys.exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):
            for line in _usage_lines(error):
                say(line)
            sys.exit(2)
        if (full := lack_of_space(error)) is not None and "--debug" not in sys.argv:
            say_error(full, code=1)
        else:
            say_crash(error)
        sys.exit(1)
    finally:
        reset()


def _usage_lines(error: Any) -> list[str]:
    """Return the lines of a usage error, whose message repeats an argument."""
    written = io.StringIO()
    error.show(file=written)
    message = error.format_message()
    return written.getvalue().replace(message, visible(message)).splitlines()


def _run_command() -> None:
    try:
        app(standalone_mode=False)
    except ModuleNotFoundError as error:
        if (lacking := missing_package(error, what="this command")) is None:
            raise
        raise lacking from error


def _print_made(made: dict[str, Any]) -> None:
    table = made.pop("table", None)
    if table is not None:
        console().print(table)
    from p2r.pipeline.lines import made_lines

    for line in made_lines(made):
        show(line)
