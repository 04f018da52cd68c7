"""LoRA routes under ``/v1/internal/lora``: which there are, applying a set, taking all off."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from modules.errors import OptionError
from modules.options import adapter_text
from modules.protocol import AdaptersReport
from modules.service import Service


class LoadLorasBody(BaseModel):
    """The whole set that is to be active. Weights stand beside the names, or in them (``pirate:0.5``), or are 1."""

    model_config = ConfigDict(extra="forbid")

    lora_names: list[str]
    lora_weights: list[float] | None = None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/v1/internal/lora/list")
    def names() -> dict[str, list[str]]:
        return {"lora_names": [lora.name for lora in service.loras.all()]}

    @routes.post("/v1/internal/lora/load")
    def load(body: LoadLorasBody) -> dict[str, Any]:
        return report(service.loras.apply(entries(body)))

    @routes.post("/v1/internal/lora/unload")
    def unload() -> dict[str, Any]:
        return report(service.loras.apply([]))

    return routes


def entries(body: LoadLorasBody) -> list[str]:
    """The set as the option ``lora`` names it. Raises OptionError where there are not as many weights as names."""
    if body.lora_weights is None:
        return body.lora_names
    if len(body.lora_weights) != len(body.lora_names):
        raise OptionError(
            f"lora_weights holds {len(body.lora_weights)} numbers for {len(body.lora_names)} LoRAs.",
            "Give one weight for each name, or leave lora_weights out.",
        )
    return [adapter_text(name, weight) for name, weight in zip(body.lora_names, body.lora_weights, strict=True)]


def report(applied: AdaptersReport) -> dict[str, Any]:
    """What is active now, and how far it moves the model from its base, in nats."""
    return {
        "lora_names": [choice.name for choice in applied.adapters],
        "lora_weights": [choice.weight for choice in applied.adapters],
        "moved_nats": applied.moved_nats,
        "seconds": applied.seconds,
        "notes": list(applied.notes),
    }
