"""Many answers at once: those that are under way decode together, and new ones join between two steps.

Not by transformers' own continuous batching, although it exists: it samples all requests of a batch alike or needs
every processor to be one it knows, has one random generator for all, knows no LoRA sets, and makes the first request
wait for its warm-up. Here each answer chooses its own tokens from its own row of the scores, so that what it says
does not depend on who else is answered.

=============  ========================================================================================
line           who waits, in which order, and what place each has
scheduler      whose turn it is: reading prompts, steps, sets of LoRAs, giving memory up
row            one answer under way
choosing       how it chooses its tokens
steps          the calls of the model: a prompt, one answer alone, many together
slabs          where the keys and values of many answers lie
attention      how a layer attends to them
suitable       which models this works for; the others answer one request after another by ``model.generate``
=============  ========================================================================================

An answer that is alone goes through the same calls with the same inputs as in ``model.generate``.
"""

from __future__ import annotations

from modules.worker.batching.line import Line, Ticket

__all__ = ["Line", "Ticket"]
