"""What an option needs to know of the model and the machine to say whether it applies."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Circumstances:
    """Plain facts; ``modules.library`` and ``modules.devices`` fill them in. Nothing chosen yet: all defaults."""

    model_chosen: bool = False
    quantization: str = ""  # "gptq", "awq", "bitsandbytes", "gguf", … as the checkpoint stores it; "" = none
    has_rope: bool = True
    rope_scaling: str = ""  # the model's own scaling ("llama3", "yarn", …); "" = none
    has_custom_code: bool = False
    has_slow_tokenizer: bool = False
    has_fast_tokenizer: bool = True
    gpu_names: tuple[str, ...] = ()
    context_tokens: int = 0  # the model's own limit; 0 = not known
    values: dict[str, object] = field(default_factory=dict)  # the other options as they stand

    @property
    def gpu_count(self) -> int:
        return len(self.gpu_names)

    def on(self, name: str) -> bool:
        """Whether the option ``name`` is turned on among :attr:`values`."""
        return bool(self.values.get(name))
