# For agents that serve DNS to frontends, workers and edges, which look up registries and frontends and write nothing.
# Set it as the agent's default token: DNS queries carry no token.

service "tandem" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}
