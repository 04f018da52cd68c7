"""Layers of peft around the model's modules, and how they come into the model and out of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.functional import delete_adapter, inject_adapter_in_model, set_adapter, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper

from modules.errors import AdapterMismatch
from modules.worker.adapters import packing
from modules.worker.adapters.files import PREFIX, AdapterFiles


class Wrapping:
    """The layers of all attached adapters of one kind. They stand in the model between :meth:`show` and :meth:`hide`;
    otherwise the model's own modules do.

    Functions of peft's documented interface for other libraries do the work; a ``PeftModel`` would move offloaded
    layers to where it thinks best, and stay in the way of every call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._configs: dict[str, PeftConfig] = {}
        self._own: dict[str, Any] = {}  # the model's modules, by name
        self._wrappers: dict[str, Any] = {}  # what stands in their place, by the same names

    @property
    def empty(self) -> bool:
        return not self._configs

    def show(self) -> None:
        _put(self._model, self._wrappers)

    def hide(self) -> None:
        _put(self._model, self._own)

    def add(self, adapter: AdapterFiles, key: str) -> int:
        """Attach an adapter under the name ``key``, with the layers in the model; returns its bytes.

        Where anything fails, all is as before. Raises AdapterMismatch, and what the libraries raise.
        """
        before = dict(self._model.named_modules())
        try:
            with packing.kept(self._model), _trainability_kept(self._model), _quiet():
                self._inject(adapter, key)
        except BaseException:
            self._take_back(before, key)
            raise
        self._note_wrappers(before)
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors_of(key))

    def remove(self, key: str) -> None:
        """Forget an adapter and free its memory, with the layers in the model."""
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self._configs.pop(key).peft_type]
        with _quiet():
            for wrapper in self._wrappers.values():
                delete_adapter(wrapper, key, prefix)

    def activate(self, weights: Mapping[str, float]) -> None:
        """Let the adapters of these keys act, each times its weight, with the layers in the model."""
        set_adapter(self._model, list(weights), inference_mode=True)
        for layer in self._layers():
            if isinstance(layer, TrainableTokensLayer):
                # peft 0.21 lets adapters act here that have no tokens, and fails in the model's next call.
                layer.set_adapter([key for key in weights if key in layer.token_indices], inference_mode=True)
            for key, weight in weights.items():
                if hasattr(layer, "set_scale"):
                    layer.set_scale(key, weight)

    def replaced(self, adapter: AdapterFiles, key: str) -> frozenset[str]:
        """Of which modules this attached adapter replaces weights, all or those of some tokens: no weight scales it."""
        of_tokens = {
            name.rpartition(".")[2]
            for name, wrapper in self._wrappers.items()
            for layer in _tuner_layers(wrapper)
            if isinstance(layer, TrainableTokensLayer) and key in layer.token_indices
        }
        return frozenset(getattr(adapter.config, "modules_to_save", None) or ()) | of_tokens

    # --- attaching ---

    def _inject(self, adapter: AdapterFiles, key: str) -> None:
        self._model.peft_config = self._configs
        try:
            inject_adapter_in_model(adapter.config, self._model, key, low_cpu_mem_usage=True)
            for layer in _tuner_layers(self._model):
                _allocate(layer, key)
            # Without the prefix that a PeftModel would have, which wrappers of whole modules do not expect here.
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors().items()}
            with _tokens_of_others_passed_over(self._model, key):
                result = set_peft_model_state_dict(self._model, tensors, adapter_name=key)
        finally:
            del self._model.peft_config
        _check_all_is_there(adapter, key, result, self._model)

    def _note_wrappers(self, before: Mapping[str, Any]) -> None:
        """Remember which modules now have a layer of peft in their place."""
        for name, module in self._model.named_modules():
            if name in before and before[name] is not module:
                self._own.setdefault(name, before[name])
                self._wrappers[name] = module.eval()
        for wrapper in self._wrappers.values():
            wrapper.eval()  # new adapters begin in training mode, where dropout acts

    def _take_back(self, before: Mapping[str, Any], key: str) -> None:
        now = dict(self._model.named_modules())
        _put(self._model, {name: module for name, module in before.items() if name and now.get(name) is not module})
        self._configs.pop(key, None)
        with _quiet():
            for layer in self._layers():
                layer.delete_adapter(key)

    def _layers(self) -> Iterator[Any]:
        for wrapper in self._wrappers.values():
            yield from _tuner_layers(wrapper)

    def _tensors_of(self, key: str) -> Iterator[torch.Tensor]:
        for wrapper in self._wrappers.values():
            yield from (tensor for name, tensor in wrapper.named_parameters() if key in name.split("."))


@contextmanager
def _trainability_kept(model: Any) -> Iterator[None]:
    """Give the model's parameters their ``requires_grad`` back, which peft takes from them.

    Nothing is trained here, but torch 2.13 multiplies bfloat16 on a CPU some 9 % faster by weights that have it.
    """
    had = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in had:
            parameter.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings: that there is a peft_config already, that an adapter it thinks active is deleted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _tokens_of_others_passed_over(model: Any, key: str) -> Iterator[None]:
    """Let an adapter without tokens of its own be read where another has some: peft 0.21 looks for them in its file."""
    wrappers = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    passed_over = [wrapper for wrapper in wrappers if key not in wrapper.token_adapter.token_indices]
    for wrapper in passed_over:
        wrapper.adapter_state_dict_load_map = lambda _: {}
    try:
        yield
    finally:
        for wrapper in passed_over:
            del wrapper.adapter_state_dict_load_map


def _put(model: Any, modules: Mapping[str, Any]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _tuner_layers(module: Any) -> Iterator[Any]:
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


def _allocate(layer: Any, key: str) -> None:
    """Give an adapter's parameters memory, in float32 as peft computes them, where the layer computes."""
    device = _device(layer.get_base_layer())
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name, {})
        if key not in holder:
            continue
        if isinstance(holder[key], torch.nn.Module):
            holder[key].to_empty(device=device).float()
        else:
            empty = torch.empty(holder[key].shape, dtype=torch.float32, device=device)
            holder[key] = torch.nn.Parameter(empty, requires_grad=False)


def _device(base: Any) -> torch.device:
    """Where a module computes. Weights on torch's meta device lie in RAM or on disk until a hook brings them."""
    hook = getattr(base, "_hf_hook", None)
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.device.type != "meta":
            return torch.device(tensor.device)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def _check_all_is_there(adapter: AdapterFiles, key: str, result: Any, model: Any) -> None:
    """Raise AdapterMismatch where a tensor of the file had no place, or a place got no tensor: peft tells neither."""
    own = {name for name, _ in model.named_parameters() if key in name.split(".")}
    missing = sorted(own & set(result.missing_keys))
    if result.unexpected_keys:
        raise AdapterMismatch(
            f"{len(result.unexpected_keys)} tensors of {adapter.name} fit no module that its configuration names: "
            f"{result.unexpected_keys[0]}."
        )
    if missing or not own:
        raise AdapterMismatch(
            f"{adapter.name} lacks {len(missing)} of the {len(own)} tensors that its configuration asks for"
            f"{': ' + missing[0] if missing else ''}."
        )
    meta = [name for name, parameter in model.named_parameters() if name in own and parameter.is_meta]
    if meta:
        raise AdapterMismatch(f"{adapter.name} replaces {meta[0]}, which lies on disk or in RAM beside a GPU.")
