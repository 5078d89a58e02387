"""The budget that `expert_memory` sets for the weights of experts, the same for all devices."""

from fusionroute.runtime.errors import InputError


def check_budget(budget: int, size: int) -> None:
    """Raise InputError for a budget that does not hold one expert of `size` bytes."""
    if size > budget:
        raise InputError(f"expert_memory={budget} does not hold the {size} bytes of one expert: allow at least as much, or none.")
