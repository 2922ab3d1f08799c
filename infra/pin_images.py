#!/usr/bin/env python3
"""Pins for container images: tags -> their current digests, in the files that Docker and Kubernetes read.

    python infra/pin_images.py                                  # infra/docker/.env
    python infra/pin_images.py --p2r REGISTRY/p2r:0.1.0-cuda    # and infra/kuberay/components/images/, for a pushed image

Tags move and digests do not, so nothing is built or started by tag. Without these files the Dockerfile, compose and the
overlays fail. Commit them, and every machine runs the same bytes. Requires docker with buildx; pulls no image.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

INFRA = Path(__file__).parent
IMAGES = {
    "P2R_PYTHON_IMAGE": "python:3.11.14-slim-bookworm",  # base of our images
    "P2R_SEAWEEDFS_IMAGE": "chrislusf/seaweedfs:4.48",
    "P2R_PROMETHEUS_IMAGE": "prom/prometheus:v3.13.3",
    "P2R_GRAFANA_IMAGE": "grafana/grafana:12.4.0",
}


def digest_of(image: str) -> str:
    """Return the current digest of an image's tag, covering all its platforms.

    Raises:
        ValueError: The digest cannot be read; gives the image and docker's message.
    """
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{image}: docker buildx is needed to ask its registry: {error}") from None
    digest = done.stdout.strip()
    if done.returncode != 0 or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ValueError(f"{image}: no digest: {(done.stderr or done.stdout).strip() or 'docker printed nothing'}")
    return digest


def component(p2r: str, digest: str, seaweedfs_digest: str) -> str:
    """Return the kustomize component that sets the digest of every image in the overlays."""
    repository = re.sub(r":[^:/]+$", "", p2r)
    return (
        f"# Made by `python infra/pin_images.py --p2r {p2r}`.\n"
        "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\nimages:\n"
        f'  - {{name: p2r, newName: {repository}, digest: "{digest}"}}\n'
        f'  - {{name: chrislusf/seaweedfs, digest: "{seaweedfs_digest}"}}\n'
    )


def main() -> int:
    """Look up every digest, then write the files: all or none."""
    parser = argparse.ArgumentParser(description="Pin container images by the digests that their tags have now.")
    parser.add_argument("--p2r", metavar="IMAGE", help="p2r's own image for KubeRay, after docker push")
    parser.add_argument("--folder", type=Path, default=INFRA, help="folder of docker/ and kuberay/ (infra)")
    arguments = parser.parse_args()
    try:
        digests = {variable: digest_of(image) for variable, image in IMAGES.items()}
        own = digest_of(arguments.p2r) if arguments.p2r else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = arguments.folder / "docker/.env"
    lines = [f"{variable}={image}@{digests[variable]}" for variable, image in IMAGES.items()]
    written.write_text("\n".join(["# Made by `python infra/pin_images.py`.", *lines, ""]))
    print(written)
    if own is not None:
        written = arguments.folder / "kuberay/components/images/kustomization.yaml"
        written.parent.mkdir(exist_ok=True)
        written.write_text(component(arguments.p2r, own, digests["P2R_SEAWEEDFS_IMAGE"]))
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
