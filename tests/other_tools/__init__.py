"""Tools and agents of other projects, as they come, against a cluster: `make tools-test`."""
