"""Commands that plan a pretraining: plan, tune-batch."""

from typing import TYPE_CHECKING, Annotated

import typer

from p2r.console import show
from p2r.logs import say

if TYPE_CHECKING:
    pass

from cluster.commands.options import Debug, JobPath, Overrides, pretrain_config, print_rows


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
        pretrain_config(job, path),
        num_nodes=nodes,
        workers_per_node=workers_per_node,
        device=device,
        memory_gib=memory_gib,
        images_per_s=images_per_s_per_worker,
        cost_per_hour=cost_per_hour,
        as_json=json_,
        say=say,
    )


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

    config = pretrain_config(read_job(path, tuple(set_ or ())), path)
    found = tune(config, device=this_device(), memory_gib=memory_gib, say=say)
    print_rows(
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
    print_rows(
        ("workers", "images of each", "pretrain.micro_batch"),
        [(str(cut.num_workers), str(cut.images), str(cut.micro_batch or "null")) for cut in found.cuts],
        title=f"pretrain.global_batch: {config.global_batch}",
    )
