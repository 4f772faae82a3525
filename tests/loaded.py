"""What every command loads and makes ready when it begins, once for all the processes that `tests.killing` forks."""

import peft  # noqa: F401
import plotly.offline  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401
import tyro  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import trimtab.cli
import trimtab.recipes.fresh  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # some hundred regular expressions
