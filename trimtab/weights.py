"""Models on disk: what a `--model` names, reading weights and tokenizers, adapters, writing a standard folder."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.pytorch_utils import Conv1D

from trimtab.builtin import BUILTIN_MODELS, builtin_model, written_whole
from trimtab.model_files import check_files, check_safetensors, own_code, tensor_names
from trimtab.progress import console
from trimtab.untrusted import home_expanded, read_json_object

Source = Path | str
"""A folder, or the id of a model on the hub."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


# ---- What a name means


def resolve(source: Source) -> Source:
    """The folder or hub id that a `--model` means: a built-in name, a run (its final model), a folder, a hub id.

    Raises FileNotFoundError for a path that is not there, ValueError for a folder or name that holds no model.
    """
    name = str(source)
    if name in BUILTIN_MODELS:
        return builtin_model(name)
    path = home_expanded(name)
    if path.is_dir():
        folder = _model_folder(path)
        check_files(folder)
        return folder
    if path.exists():
        raise ValueError(f"--model {name} is a file; give the folder that holds config.json and *.safetensors.")
    known = f"built-in models are {', '.join(BUILTIN_MODELS)}"
    if isinstance(source, Path) or os.path.isabs(path) or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"--model {name}: there is no such folder ({known}).")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"--model {name!r} is neither a folder nor a hub id such as organisation/model ({known}).")
    return name


def _model_folder(path: Path) -> Path:
    if (path / ADAPTER_CONFIG).exists() or (path / "config.json").exists():
        return path
    if (path / "config.yaml").exists():
        if (path / "model" / "config.json").exists():
            return path / "model"
        raise FileNotFoundError(f"the run {path} has no final model yet: {path / 'model'} is missing.")
    raise ValueError(f"{path} holds no model: neither config.json, {ADAPTER_CONFIG} nor a run's config.yaml is in it.")


def _is_adapter(source: Source) -> bool:
    return isinstance(source, Path) and (source / ADAPTER_CONFIG).exists() and not (source / "config.json").exists()


def _base_of(adapter: Path) -> Source:
    base = under = _named_base(adapter)
    passed = {adapter.resolve()}
    while _is_adapter(under):
        if (place := Path(under).resolve()) in passed:
            raise ValueError(f"the adapter {adapter} stands on itself: {place / ADAPTER_CONFIG} leads back to it.")
        passed.add(place)
        under = _named_base(Path(under))
    return base


def _named_base(adapter: Path) -> Source:
    named = read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise ValueError(f"{adapter / ADAPTER_CONFIG} does not say which model it adapts (base_model_name_or_path).")
    return resolve(named)


# ---- Reading


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and notes: what matters in them is checked here and raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _from_pretrained(auto: Any, source: Source, **options: Any) -> Any:
    """`auto.from_pretrained`, with one clear ValueError for everything that keeps a model from being loaded."""
    if options.get("trust_remote_code"):
        _say_code(source)
    try:
        with _quiet():
            return auto.from_pretrained(str(source), **options)
    except Exception as error:  # tokenizers raises nothing more special
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings its own Python code. Read that code; to run it, add --trust-remote-code"
        elif not isinstance(source, Path):
            reason += ". Is the id right, the hub reachable, and the model public (or `hf auth login` done)?"
        raise ValueError(f"the model {source} could not be loaded: {reason}") from error


@cache
def _say_code(source: Source) -> None:
    """Say what --trust-remote-code lets run, before it runs."""
    if isinstance(source, Path):
        code = ", ".join(own_code(source))
        told = f"runs its own code: {code}" if code else "brings no code of its own"
    else:
        told = "may run code of its own from the hub"
    console.print(f"--trust-remote-code: {source} {told}", markup=False)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter without one, its base model's."""
    folder = resolve(source)
    if _is_adapter(folder) and not (Path(folder) / "tokenizer_config.json").exists():
        return load_tokenizer(_base_of(Path(folder)), trust_remote_code=trust_remote_code)
    return _from_pretrained(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def load_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a resolved model."""
    return _from_pretrained(AutoConfig, source, trust_remote_code=trust_remote_code)


def has_reward_head(source: Source, *, trust_remote_code: bool = False) -> bool:
    """Whether a model is a sequence classifier rather than a language model, read from its config or adapter."""
    folder = resolve(source)
    if _is_adapter(folder):
        if any(".score." in key for key in tensor_names(_adapter_weights(Path(folder)))):
            return True
        return has_reward_head(_base_of(Path(folder)), trust_remote_code=trust_remote_code)
    names = load_config(folder, trust_remote_code=trust_remote_code).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def load_language_model(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in float32; an adapter is merged into its base. Raises ValueError for anything else."""
    folder = resolve(source)
    if has_reward_head(folder, trust_remote_code=trust_remote_code):
        raise ValueError(f"{source} is a reward model; a language model is needed here.")
    if _is_adapter(folder):
        base = load_language_model(_base_of(Path(folder)), trust_remote_code=trust_remote_code)
        return _merge_adapter(base, Path(folder))
    return _load_weights(AutoModelForCausalLM, folder, trust_remote_code)


def load_body(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Any transformer without its head, in float32, such as an embedder. ValueError for an adapter."""
    folder = resolve(source)
    if _is_adapter(folder):
        raise ValueError(f"{source} is an adapter; give the folder of a whole model.")
    return _load_weights(AutoModel, folder, trust_remote_code)


def load_classifier(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A reward model, a sequence classifier of one label, in float32.

    Raises ValueError for a model without a reward head: a head of random numbers would score without complaint.
    """
    folder = resolve(source)
    if not has_reward_head(folder, trust_remote_code=trust_remote_code):
        command = f"trimtab reward --model {source} --data PREFERENCES --out RUN"
        raise ValueError(f"{source} has no reward head. Train one with `{command}`.")
    if _is_adapter(folder):
        return _merge_adapter(_classifier_under(Path(folder), trust_remote_code), Path(folder))
    labels = load_config(folder, trust_remote_code=trust_remote_code).num_labels
    if labels != 1:
        raise ValueError(f"{source} classifies into {labels} labels; a reward model has one.")
    return _load_weights(AutoModelForSequenceClassification, folder, trust_remote_code)


def _classifier_under(adapter: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The classifier that a reward model's adapter changes; the adapter brings the head if its base has none."""
    base = _base_of(adapter)
    if has_reward_head(base, trust_remote_code=trust_remote_code):
        return load_classifier(base, trust_remote_code=trust_remote_code)
    return classifier_from(load_language_model(base, trust_remote_code=trust_remote_code), seed=0)


def _load_weights(auto: Any, folder: Source, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(folder, Path):
        check_safetensors(folder)
    network, report = _from_pretrained(
        auto,
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"the weights of {folder} lack {len(missing)} of {type(network).__name__}: {shown}.")
    return network


def _adapter_weights(adapter: Path) -> Path:
    check_safetensors(adapter, ADAPTER_WEIGHTS)
    return adapter / ADAPTER_WEIGHTS


def _merge_adapter(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    _adapter_weights(adapter)
    try:
        with _peft_on_new_transformers():
            merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    except Exception as error:  # peft raises as it happens to, KeyError and RuntimeError among others
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the adapter {adapter} could not be put on its base model: {reason[0]}") from error
    # peft froze the base when it put the adapter in.
    merged.requires_grad_(True)
    merged.name_or_path = str(adapter)
    return merged


# ---- A reward model from a language model


def classifier_from(network: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A sequence classifier of one label on a language model's body, its head drawn anew (see `reset_head`).

    Raises ValueError for families that transformers has no sequence classifier for.
    """
    config = copy.deepcopy(network.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ValueError(f"transformers has no sequence classifier for {config.model_type} models.") from error
    setattr(classifier, classifier.base_model_prefix, network.base_model)
    reset_head(classifier, seed=seed)
    left = [name for name, parameter in classifier.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"reward models of the family {config.model_type} are not supported: {', '.join(left[:3])}.")
    classifier.name_or_path = network.name_or_path
    return classifier.eval()


def reset_head(classifier: PreTrainedModel, *, seed: int) -> None:
    """Draw the reward head anew: normal, standard deviation 1 / (hidden size + 1), no bias.

    So the first scores are close to 0 and the first Bradley-Terry loss is close to ln 2, whatever the seed.
    """
    head = score_head(classifier)
    size = head.in_features
    weight = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / (size + 1)
    classifier.score = nn.Linear(size, 1, bias=False, device="meta")
    classifier.score.weight = nn.Parameter(weight)


def score_head(classifier: PreTrainedModel) -> nn.Linear:
    """The head of a sequence classifier; ValueError if it is not the usual linear map without bias."""
    head = getattr(classifier, "score", None)
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"{type(classifier).__name__} has no linear `score` head; decoders such as Llama have.")
    return head


# ---- Adapters


@contextmanager
def _peft_on_new_transformers() -> Iterator[None]:
    """Without the notice that peft asks a model by an old name whether it checkpoints activations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def add_lora(
    network: PreTrainedModel, head: nn.Module | None, *, rank: int, alpha: float | None, seed: int
) -> PeftModel:
    """Low-rank adapters (Hu et al. 2021) on every linear layer but the head; they start as no change at all."""
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    targets = [name for name, layer in linear.items() if layer is not head]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in targets),
        task_type="CAUSAL_LM" if network.can_generate() else None,
    )
    with torch.random.fork_rng(devices=[]), _peft_on_new_transformers():
        torch.manual_seed(seed)
        adapted = get_peft_model(network, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def merged_weight(layer: Any) -> Tensor:
    """The weight that a linear layer computes with: its adapter's part added, unless the adapter is switched off.

    The layer itself stays as it is.
    """
    if not isinstance(layer, BaseTunerLayer):
        return layer.weight
    weight = layer.get_base_layer().weight
    return weight if layer.disable_adapters else weight + layer.get_delta_weight("default")  # pyright: ignore


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights with every adapter merged in, under their ordinary names. The network itself stays as it is."""
    layers: dict[str, Any] = dict(network.named_modules())
    state = {}
    for key, value in network.state_dict().items():
        owner, inside, name = key.rpartition(".base_layer.")
        if inside and isinstance(layers.get(owner), BaseTunerLayer):
            state[f"{owner}.{name}"] = merged_weight(layers[owner]) if name == "weight" else value
        elif ".lora_" not in key:
            state[key] = value
    return state


# ---- Writing


def write_model(
    folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype | None = None
) -> None:
    """A standard folder: config, safetensors, tokenizer with its chat template, generation config; adapters merged.

    It appears whole or not at all. Weights keep their type (float32) unless `dtype` says otherwise.
    """
    state = merged_state(network)
    if dtype is not None:
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    with written_whole(folder) as partial, _quiet():
        network.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        if dtype is not None:
            _set_dtype(partial / "config.json", dtype)


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({**entries, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")
