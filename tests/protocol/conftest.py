"""Hypothesis for the protocol: no deadlines (the machine may be busy), the same examples each run
where CI asks for it."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "protocol", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("protocol"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "protocol")
