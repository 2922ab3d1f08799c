"""Section `publish`: checkpoint -> backbone that others can load."""

from typing import Annotated

from pydantic import Field

from p2r.config.section import Section
from p2r.exports import ExportName


class PublishConfig(Section):
    """Publishing: checkpoint -> backbone that others can load."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Folder under `<storage>/backbones/`."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "1"
    """Folder under the name. A published version is never overwritten with other weights."""
    licence: str | None = None
    """Licence of the weights. None: the corpus's licence, which is also the only one allowed where the corpus forbids others."""
    description: str = ""
    """One paragraph for the model card."""
    exports: tuple[ExportName, ...] = ()
    """Formats of other tools in which the backbone is written, too, as `<storage>/exports/NAME-VERSION/FORMAT/`: monai (a MONAI bundle),
    onnx, huggingface, nnunet. `p2r export` writes them later, and models, too."""
