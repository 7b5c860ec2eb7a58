"""The old name of `anydelta.integrations.transformers.prefix`."""

from .transformers.prefix import Checkpoint as Checkpoint
from .transformers.prefix import PrefixStore as PrefixStore
