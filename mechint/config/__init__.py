"""The settings of each command: one frozen dataclass is its flags, their help, config.json and arguments in Python."""

from mechint.config.base import (
    DATASET_ALIASES,
    DEFAULT_HOOK,
    Backend,
    Config,
    Dtype,
    Processing,
    ReadsSAE,
    canonical_hook,
    check_run_name,
    layer_of_hook,
    require,
    said,
)
from mechint.config.collect import COLLECT_PRESETS, CollectConfig
from mechint.config.concepts import ConceptsConfig
from mechint.config.presets import TRAIN_PRESETS, preset_values
from mechint.config.readers import AblateConfig, CompareConfig, EvalConfig, RankConfig
from mechint.config.report import ReportConfig
from mechint.config.steering import ExtractConfig, SteerConfig
from mechint.config.sweep import SweepConfig
from mechint.config.train import SAETrainConfig

__all__ = [
    "COLLECT_PRESETS",
    "DATASET_ALIASES",
    "DEFAULT_HOOK",
    "TRAIN_PRESETS",
    "AblateConfig",
    "Backend",
    "CollectConfig",
    "CompareConfig",
    "ConceptsConfig",
    "Config",
    "Dtype",
    "EvalConfig",
    "ExtractConfig",
    "Processing",
    "RankConfig",
    "ReadsSAE",
    "ReportConfig",
    "SAETrainConfig",
    "SteerConfig",
    "SweepConfig",
    "check_run_name",
    "canonical_hook",
    "layer_of_hook",
    "preset_values",
    "require",
    "said",
]
