# For the registries, the only ones that write to Consul. `tandem` is the setting consul_service: one cluster's name.

# Enters, checks and removes the members of this cluster, and reads them. No other service, not even one whose name
# begins the same way.
service "tandem" {
  policy = "write"
}

# Holds one key, the generation of this cluster's data.
key "tandem/generation" {
  policy = "write"
}

# A service's health is told with the health of its node.
node_prefix "" {
  policy = "read"
}
