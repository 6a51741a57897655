"""A cluster of service processes on this machine: what `tandem up` and the tests start and stop."""
