"""What every benchmark gets: the run's options and fixtures."""

pytest_plugins = ["benchmarks.plugin"]
