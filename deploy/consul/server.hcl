# A Consul server for production: requires tokens and client certificates. Tested with Consul 1.8.7.
# The order of the commands is in README.md beside this file.

datacenter       = "dc1"
data_dir         = "/var/lib/consul"
server           = true
bootstrap_expect = 3

# Registries use the agent of their own machine; other machines reach the ports of servers and gossip only.
client_addr = "127.0.0.1"
bind_addr   = "{{ GetPrivateIP }}"

ports {
  http  = -1
  https = 8501
  dns   = 8600
}

ui = true

acl {
  enabled        = true
  default_policy = "deny"
  # Tokens cached by an agent stay valid while the servers have no leader.
  down_policy              = "extend-cache"
  enable_token_persistence = true
}

# Made by `tandem certs` (development), or by your own CA.
# Since 1.12 these stand in a block: tls { defaults { ... } }; the old names are still read, with a warning.
ca_file   = "/etc/consul.d/certs/ca.pem"
cert_file = "/etc/consul.d/certs/consul.pem"
key_file  = "/etc/consul.d/certs/consul-key.pem"

# Mutual TLS, also for HTTPS: without a certificate there is no response, even with a token.
verify_incoming        = true
verify_outgoing        = true
# A server must hold the name server.dc1.consul, which consul.pem holds and no other certificate does.
verify_server_hostname = true

# Health checks of members with TLS: the agent presents its certificate, which they require. This version verifies their
# certificates against server_name, so every member's certificate must contain that name; those of `tandem certs`
# contain localhost.
# Without this, set consul_checks = false on the registries: liveness is then decided by the leases alone.
enable_agent_tls_for_checks = true
server_name                 = "localhost"

# No update checks; and a scaled-out registry needs few connections.
disable_update_check = true
limits {
  http_max_conns_per_client = 200
}
