"""Schema of the `p2r` part of a job file: one frozen pydantic model per section, and one module per section.

Unknown keys are rejected in every section; `p2r.job` adds the nearest valid name. Names carry their units. The docstring
of a field is also its description in the JSON Schema.
"""

from p2r.config.finetune import FinetuneConfig
from p2r.config.imported import ImportedConfig
from p2r.config.ingest import IngestConfig, QualityConfig, SessionsConfig, SubjectsOf
from p2r.config.loss import LossConfig, ReconstructionConfig
from p2r.config.model import ModelConfig
from p2r.config.other import OtherConfig
from p2r.config.pretrain import BalanceConfig, CorpusShare, OptimizerConfig, PretrainConfig, ProbeConfig
from p2r.config.publish import PublishConfig
from p2r.config.search import Candidates, Distribution, SearchConfig
from p2r.config.section import Artefact, FilledIn, Fraction, Location, NumLabelled, Range, Section, Within
from p2r.config.views import PERCENTILES, VIEWS, GeometryConfig, ImageConfig, IntensityConfig, ViewsConfig

__all__ = [
    "PERCENTILES",
    "VIEWS",
    "Artefact",
    "BalanceConfig",
    "Candidates",
    "CorpusShare",
    "Distribution",
    "FilledIn",
    "FinetuneConfig",
    "Fraction",
    "GeometryConfig",
    "ImageConfig",
    "ImportedConfig",
    "IngestConfig",
    "IntensityConfig",
    "Location",
    "LossConfig",
    "ModelConfig",
    "NumLabelled",
    "OptimizerConfig",
    "OtherConfig",
    "PretrainConfig",
    "ProbeConfig",
    "PublishConfig",
    "QualityConfig",
    "Range",
    "ReconstructionConfig",
    "SearchConfig",
    "Section",
    "SessionsConfig",
    "SubjectsOf",
    "ViewsConfig",
    "Within",
]
