"""The one table of options. Flags, widgets, saved settings, validation and README's tables loop over it."""

from modules.options.adapters import adapter_text, adapters_in_words, split_adapter
from modules.options.circumstances import Circumstances
from modules.options.generation import GENERATION_OPTIONS, GenerationOptions
from modules.options.loader import (
    GROUPS,
    LOAD_OPTIONS,
    PRECISIONS,
    LoadOptions,
    allowed_gpus,
    alpha_for,
    changed,
    check,
    context_tokens,
    kept_tokens,
    stretched_context,
)
from modules.options.server import COMMAND_OPTIONS, SERVER_OPTIONS, CommandOptions, ServerOptions
from modules.options.spec import Spec, find, parse_values
from modules.options.training import (
    DATA_FORMATS,
    TRAINING_FILE,
    TRAINING_GROUPS,
    TRAINING_OPTIONS,
    DataFormat,
    TrainingOptions,
    training_options,
    training_reasons,
)

__all__ = [
    "COMMAND_OPTIONS",
    "DATA_FORMATS",
    "GENERATION_OPTIONS",
    "GROUPS",
    "LOAD_OPTIONS",
    "PRECISIONS",
    "SERVER_OPTIONS",
    "TRAINING_FILE",
    "TRAINING_GROUPS",
    "TRAINING_OPTIONS",
    "Circumstances",
    "CommandOptions",
    "DataFormat",
    "GenerationOptions",
    "LoadOptions",
    "ServerOptions",
    "Spec",
    "TrainingOptions",
    "adapter_text",
    "adapters_in_words",
    "allowed_gpus",
    "alpha_for",
    "changed",
    "check",
    "context_tokens",
    "find",
    "kept_tokens",
    "parse_values",
    "split_adapter",
    "stretched_context",
    "training_options",
    "training_reasons",
]
