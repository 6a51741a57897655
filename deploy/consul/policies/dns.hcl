# For the agent that answers DNS to frontends, workers and edges: they find registries and frontends by it, and write
# nothing. Give it to the agent, as its default token: a question by DNS carries none.

service "tandem" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}
