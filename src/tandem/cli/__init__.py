"""The `tandem` command: local cluster, client, operations. One module per subcommand."""
