"""Membership in Consul: any number of replicas, one view. What is written is `records`, what it means is `observed`."""
