"""The models of the cluster: loaded when their workers appear, ended when these have left (ADR 37)."""
