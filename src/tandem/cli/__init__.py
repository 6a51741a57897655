"""The `tandem` command: a local cluster, a client, a look at the workers. One file for each subcommand."""
