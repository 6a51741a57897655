# A Consul server for production: nothing without a token, nothing without a certificate. Run with Consul 1.8.7.
# The order of the commands is in README.md beside this file.

datacenter       = "dc1"
data_dir         = "/var/lib/consul"
server           = true
bootstrap_expect = 3

# Registries ask the agent of their own machine; other machines reach the ports of servers and gossip only.
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
  # What an agent knows stays valid while the servers have no leader.
  down_policy              = "extend-cache"
  enable_token_persistence = true
}

# Made by `tandem certs` (development), or by your own CA.
# Since 1.12 these stand in a block: tls { defaults { ... } }; the old names are still read, with a warning.
ca_file   = "/etc/consul.d/certs/ca.pem"
cert_file = "/etc/consul.d/certs/consul.pem"
key_file  = "/etc/consul.d/certs/consul-key.pem"

# Certificates on both sides, of HTTPS too: who has none gets no answer, token or not.
verify_incoming        = true
verify_outgoing        = true
# A server must hold the name server.dc1.consul, which consul.pem holds and no other certificate does.
verify_server_hostname = true

# The agent's checks of members whose cluster runs with TLS: it shows them its certificate, because they answer nobody
# without one. In this version it takes the name that it expects of them from server_name, so this must be a name that
# every member's certificate holds; those of `tandem certs` hold localhost.
# Without this, set consul_checks = false at the registries: then only the leases say who is alive.
enable_agent_tls_for_checks = true
server_name                 = "localhost"

# Nobody asks home, and a scaled-out registry needs few connections.
disable_update_check = true
limits {
  http_max_conns_per_client = 200
}
