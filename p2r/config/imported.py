"""Section `finetune.imported`: facts about a weights file of another tool."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from p2r.config.model import ModelConfig
from p2r.config.section import FilledIn, Section
from p2r.config.views import ImageConfig


class ImportedConfig(Section):
    """Facts about a weights file of another tool that it does not state itself."""

    model: ModelConfig
    """Network of the file: name, channels and, for residual_encoder_unet, blocks. The heads are not used."""
    image: ImageConfig
    """Input image that the network is given."""
    licence: Annotated[str, FilledIn(), Field(min_length=1)]
    """SPDX identifier or name of the weights' licence; it is copied into everything made from them."""
    provenance: Annotated[str, FilledIn()] = ""
    """Origin of the weights, and how to cite them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.model.check_size(self.image.size, what="image.size")
        return self
