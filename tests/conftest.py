"""Property tests draw the same examples everywhere and are never judged by the clock of a busy machine."""

from hypothesis import HealthCheck, settings

settings.register_profile("fmfa", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fmfa")
