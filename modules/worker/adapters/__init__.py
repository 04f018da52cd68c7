"""LoRAs on a loaded model: checked, attached, mixed, switched, taken off again to the bit.

The model's own modules are never changed. An adapter layer of peft stands around the module that it adapts, and
while no LoRA is active the modules themselves stand in the model, as if there had never been one.
"""

from modules.worker.adapters.adapters import KEPT, KEPT_BYTES, Adapters

__all__ = ["KEPT", "KEPT_BYTES", "Adapters"]
