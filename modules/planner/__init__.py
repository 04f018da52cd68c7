"""How much memory a load will take and where each layer goes, decided before anything is loaded. No ML package."""

from modules.planner.estimate import Estimate, estimate, fits_beside, kv_cache_bytes

__all__ = ["Estimate", "estimate", "fits_beside", "kv_cache_bytes"]
