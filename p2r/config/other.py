"""Section `finetune.other`: a frozen network of another tool, for a row of its own in the few-shot table."""

from typing import Annotated

from pydantic import Field

from p2r.config.section import Section
from p2r.config.views import ImageConfig


class OtherConfig(Section):
    """A network that is not one of p2r's: any `nn.Module` from an image to features. Mode other_probe trains a linear head on it."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    """Name of the network, for logs and the report."""
    build: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """Function that returns the network, as `package.module:function`. The job runs this code, so the package must be installed on every
    machine. The network maps images (B, 1, *S) in [0, 1] to features (B, F, *S), or on a coarser grid."""
    options: dict[str, object] = {}
    """Arguments of the function, such as the path of its weights."""
    image: ImageConfig
    """Input image of the network: dimensions, spacing, size and intensities."""
