"""Settings of the property tests: no deadline (shape checks compile on first use), the same examples in every run."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
