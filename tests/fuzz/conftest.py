"""How long the state machines run: the same examples each time, or for a long run new ones."""

import os

from hypothesis import HealthCheck, settings

IS_LONG = os.environ.get("TENSORWIRE_FUZZ") == "long"

settings.register_profile(
    "machines",
    max_examples=500,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "machines-long",
    settings.get_profile("machines"),
    max_examples=5000,
    stateful_step_count=100,
    derandomize=False,
)


def machine_settings() -> settings:
    """Return the budget that TENSORWIRE_FUZZ asks for."""
    return settings.get_profile("machines-long" if IS_LONG else "machines")
