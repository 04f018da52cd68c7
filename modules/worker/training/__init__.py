"""Training a LoRA: examples as tokens, the model with its new layers, the loop, what is written."""
