# For one agent, to register itself. Replace NODE with its node_name: one token per machine.

node "NODE" {
  policy = "write"
}

# To see which of the services it registered earlier are still its own.
service_prefix "" {
  policy = "read"
}
