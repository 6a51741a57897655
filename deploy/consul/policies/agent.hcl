# For one agent, to enter itself. Replace NODE by its node_name: a token for each machine.

node "NODE" {
  policy = "write"
}

# To see which of the services that it once entered are still its own.
service_prefix "" {
  policy = "read"
}
