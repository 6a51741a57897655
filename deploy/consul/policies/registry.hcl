# For the registries, the only processes that write to Consul. `tandem` is the setting consul_service: one cluster's name.

# Registers, checks, removes and reads the members of this cluster; no other service, not even one whose name has the
# same prefix.
service "tandem" {
  policy = "write"
}

# Holds one key, the generation of this cluster's data.
key "tandem/generation" {
  policy = "write"
}

# Holds one key for each election: which controller leads.
key_prefix "tandem/leader/" {
  policy = "write"
}

# Consul reports the health of a service together with that of its node.
node_prefix "" {
  policy = "read"
}
